"""What every suite is measured with: contests, equality, time, memory, growth, and other people's packages."""
