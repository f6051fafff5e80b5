"""What breaks around the wall: killed processes, full disks, lost messages."""
