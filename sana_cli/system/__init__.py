"""The machine: devices, memory, disks, the user's folders, and signals."""
