"""Prints rounds as they close, with only nats-py and msgpack. Usage: outsider.py [URL [CREDS CA]]

A fleet of `seedwire up` has CREDS and CA in seedwire-state/identity: creds/outsider.creds and
tls/cert.pem.
"""

import asyncio
import ssl
import sys
from typing import Any

import msgpack
import nats


async def main(url: str, creds: str = "", ca: str = "") -> None:
    login: dict[str, Any] = {}
    if creds:
        tls = ssl.create_default_context(cafile=ca)
        login = {"user_credentials": creds, "tls": tls, "tls_hostname": "seedwire"}
    events = await (await nats.connect(url, **login)).subscribe("seedwire.v1.events.*")
    print("watching", flush=True)
    async for message in events.messages:
        event = msgpack.unpackb(message.data)
        if event["type"] == "RoundClosed":
            print(event["job"], event["round"], event["reason"], event["loss"], flush=True)
        if event["type"] == "JobEnded":
            break


asyncio.run(main(*(sys.argv[1:] or ["nats://127.0.0.1:4222"])))
