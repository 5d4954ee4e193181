"""What every analysis shares. An analysis itself says what is measured, and what is made of it."""
