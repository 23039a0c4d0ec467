"""What people read about programs. Never changes what runs."""
