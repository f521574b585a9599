"""Is a result what its lock says, does it act as the adapters do, and may it be published?"""
