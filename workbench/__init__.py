"""workbench: one LLM-serving scheduler, run against a modelled GPU or a real one."""

__version__ = "0.1.0"
