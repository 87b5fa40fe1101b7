"""What each target can run, and how its engines are built."""
