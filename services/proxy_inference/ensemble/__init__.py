"""A large model steered by two small ones, as proxy-tuning has it, drafted by the tuned one."""
