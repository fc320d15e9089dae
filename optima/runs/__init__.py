"""What a run is made of: its directory, its start, its loop, and what it leaves behind."""
