"""What people and programs talk to: the demo in a browser."""
