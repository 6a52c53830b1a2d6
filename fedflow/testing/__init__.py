"""What someone who extends fedflow runs against their own part: `store.StoreConformance` for a store backend.

Needs pytest and hypothesis: `pip install 'fedflow[test]'`.
"""
