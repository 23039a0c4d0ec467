"""What every room may use: private torch API behind one door, counters."""
