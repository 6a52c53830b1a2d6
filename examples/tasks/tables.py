"""What the sites' patients look like, within each site's policy. `fedflow run examples/tasks/tables.yaml`"""

from sites import breast_cancer
from sklearn.datasets import load_breast_cancer

from fedflow.local.tables import Tables


def tables(site: str, sites: list[str]) -> Tables:
    """One table, its columns by name. A deployed site's own configuration goes before this policy."""
    rows, labels = breast_cancer(site, sites)
    names = load_breast_cancer().feature_names
    columns = {str(name): rows[:, i] for i, name in enumerate(names)}
    return Tables(policy={"min_count": 20, "max_bins_percent": 25}, patients={**columns, "label": labels})
