"""What the backends can do, what it costs, and whether they agree: of no paper."""
