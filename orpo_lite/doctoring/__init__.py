"""What `python -m orpo_lite.doctor` looks at: the machine, the device, the hub, and a short run of the real thing."""
