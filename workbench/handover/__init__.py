"""Handovers of live instances: what connects those that prefill or decode alone, letters and KV over real connections."""
