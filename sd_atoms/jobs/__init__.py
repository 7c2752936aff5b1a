"""Many runs as one: what an experiment consists of, and the queue that works through it."""
