"""``vluna-llm demo``: the main job, end to end, without an account, a key or a network.

An embedded gate and a replay upstream listen on loopback; a wrapped client makes a few dozen calls as several
customers; at the end three books are laid side by side. Needs the extra ``demo``.
"""
