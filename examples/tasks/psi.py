"""Which patients three hospitals have in common. `fedflow run examples/tasks/psi.yaml`, then `fedflow psi psi-1`"""

import random


def patients(site: str) -> list[str]:
    """The numbers of this hospital's patients, some of them seen twice."""
    here = random.Random(site)
    return [f"patient-{here.randrange(400)}" for _ in range(600)]
