"""What every command shares: settings, files that survive a crash, locks, hardware, progress, pages."""
