"""Hwang and Shin, project on learning-rate schedules in transfer learning."""
