"""The settings of a run: declared, loaded (flags, TOML, record, preset), checked."""
