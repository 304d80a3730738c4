"""What a run is made of: declared, loaded (flags, TOML, record, preset), checked."""
