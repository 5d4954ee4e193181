"""The frame that all analyses share: options, runs, search, reports, kept results."""
