"""The way of a load: choosing, matching, reading, exchanging, filling."""
