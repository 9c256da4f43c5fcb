"""What does a person see? Console, trackers, figures."""
