"""Shon et al. (2022), DLCFT: deep linear continual fine-tuning."""
