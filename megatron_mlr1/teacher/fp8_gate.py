"""How much FP8 may change a teacher, and the text on which that is measured. No torch here."""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from megatron_mlr1.errors import ConfigError

MAX_KL: Final = 1e-3
"""Nats a token that the distribution may move by."""
MIN_AGREEMENT: Final = 0.995
"""Share of the tokens whose likeliest id must stay."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Gate:
    """What a teacher with FP8 products must keep."""

    max_kl: float = MAX_KL
    min_agreement: float = MIN_AGREEMENT
    text: Path | None = None
    """UTF-8; None takes `TEXT`."""

    def __post_init__(self) -> None:
        if not (math.isfinite(self.max_kl) and self.max_kl > 0 and 0 <= self.min_agreement <= 1):
            raise ConfigError(
                f"--fp8-max-kl is {self.max_kl} and --fp8-min-agreement {self.min_agreement}; they "
                "must be above 0, and from 0 to 1. Correct them."
            )


TEXT: Final = """\
A lighthouse keeper counts ships by night. Each ship shows two lights, one red and one green, and \
the keeper writes down the hour, the side that he saw first, and the direction of the wind. After \
a year he has three thousand lines. He notices that most ships pass within an hour of high water, \
because the channel is narrow there and nobody likes to wait.

Question: A train leaves at 9:40 and travels 84 km at 56 km/h. It then waits 12 minutes and goes \
on for 30 km at 45 km/h. When does it arrive?
Answer: 84 / 56 = 1.5 h, so it reaches the first stop at 11:10. It leaves at 11:22. The second \
part takes 30 / 45 = 2/3 h = 40 minutes. It arrives at 12:02.

def sieve(limit: int) -> list[int]:
    is_prime = [True] * (limit + 1)
    for number in range(2, int(limit**0.5) + 1):
        if is_prime[number]:
            for multiple in range(number * number, limit + 1, number):
                is_prime[multiple] = False
    return [number for number in range(2, limit + 1) if is_prime[number]]

Theorem. There is no largest prime. Proof. Let p be a prime and let N be the product of all primes \
up to p, plus one. No prime up to p divides N, since each leaves the remainder 1. So every prime \
factor of N is larger than p.

{"name": "valve-7", "open": false, "pressure_bar": 3.25, "tags": ["north", "backup"], "next": null}

SELECT city, COUNT(*) AS stations FROM sensors WHERE height_m > 200 GROUP BY city ORDER BY 2 DESC;

Wenn es regnet, bleibt die Katze auf der Fensterbank und sieht den Tropfen nach. Le matin, le \
boulanger ouvre la porte avant six heures et l'odeur du pain descend la rue. El puente une dos \
barrios que antes solo se conocían de vista.

Water boils at 100 degrees Celsius at sea level and at about 93 on a mountain of 2,000 metres, for \
the air presses less on it there. Rice therefore cooks more slowly in the hills, and a lid helps.
"""
