"""The KV of requests: pages, the page table, the prefix cache."""
