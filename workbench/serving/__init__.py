"""Live mode: a service between an API and the scheduler, in processes that exchange messages.

``http/`` is what clients see, ``text/`` what turns it into token ids and back, ``engine/`` the scheduler process and how the
others speak with it; ``supervisor`` starts and ends them.
"""
