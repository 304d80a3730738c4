"""Where the KV of requests lives: pages, the page table, the prefix cache."""
