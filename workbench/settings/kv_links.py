"""Settings of the links that carry KV between instances."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from ground.link import parse_latency, parse_rate
from workbench.scheduler.handover_settings import PAIRS, paired
from workbench.scheduler.settings import HARDWARE, Place, setting
from workbench.settings.machine import with_unit

_REAL_LINKS: dict[Place, str] = {"live": "KV goes over the links that there are"}


@dataclass(frozen=True, kw_only=True)
class KvLinkSettings:
    """Settings of the links between instances that prefill and instances that decode."""

    kv_link: str = setting(
        "50GB/s",
        group=HARDWARE,
        help="What carries KV between instances, one direction, with its unit: 50GB/s, 400Gbit/s. Default {default}.",
        read=with_unit("kv_link", parse_rate),
        needs=PAIRS,
        acts=paired,
        idle=_REAL_LINKS,
    )
    kv_link_latency: str = setting(
        "20us",
        group=HARDWARE,
        help="What every message and transfer between instances takes beside: 20us. Default {default}.",
        read=with_unit("kv_link_latency", parse_latency),
        needs=PAIRS,
        acts=paired,
        idle=_REAL_LINKS,
    )
    kv_link_per: Literal["gpu", "instance"] = setting(
        "gpu",
        group=HARDWARE,
        help="What has such a link of its own: {choices}. Default {default}.",
        needs=PAIRS,
        acts=paired,
        idle=_REAL_LINKS,
    )
