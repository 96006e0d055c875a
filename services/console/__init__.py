"""The operator's command line: start a fleet's services, submit jobs, watch them.

It alone looks into a GGUF, and only through the engine's child process. It talks to the services
as any outsider could.
"""
