"""Discount Desk: a small multi-tenant application whose customers run their own rules, behind the walls of Blastdoor.

It holds one service key. With it, it makes a tenant for each of its customers, submits in their names, registers one
webhook for all of them, and reads the stream. What a customer sees comes out of the inbox, which both ways fill.
"""

import secrets
import threading
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import redis
from fastapi import FastAPI, File, Form, HTTPException, Request, Response, UploadFile
from fastapi.responses import HTMLResponse, RedirectResponse
from starlette.concurrency import run_in_threadpool

from examples.main_app.consumer import Consumer
from examples.main_app.inbox import Customer, Inbox
from examples.main_app.pages import customer_page, output_page
from service.client import Client, NotFound, Refused, WebhookInvalid, verify_webhook

CUSTOMERS = {"bakery": "Ada's Bakery", "bikes": "Bolt Bikes"}
MAX_WEBHOOK_BYTES = 64 * 1024
MAX_UPLOAD_BYTES = 10 * 2**20
_HERE = Path(__file__).parent
SAMPLES = {
    "rule engine": _HERE.parent / "scenarios" / "rule-engine",
    "birthday discount, with a mistake": _HERE / "samples" / "too-generous",
    "hostile": _HERE.parent / "scenarios" / "hostile",
}


@dataclass(frozen=True)
class Settings:
    """`public_url`: where Blastdoor reaches this application."""

    blastdoor_url: str
    service_key: str
    redis_url: str
    public_url: str
    state: Path


class MainApp:
    """What the routes work with. One client for each customer: the key is ours, the tenant is theirs."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.inbox = Inbox(settings.state / "main-app.db")
        self.blastdoor = Client(settings.blastdoor_url, settings.service_key)
        self._stopping = threading.Event()
        self._reader = threading.Thread(target=self._read, name="consumer")

    def start(self) -> None:
        self._enrol()
        self._register_webhook()
        self._reader.start()

    def stop(self) -> None:
        self._stopping.set()
        self._reader.join()
        self.blastdoor.close()
        self.inbox.close()

    def submit(self, customer: Customer, bundle: bytes | Path) -> str:
        """-> the run's id. `metadata` comes back in every event: it is ours to use."""
        with self._as(customer) as client:
            run = client.submit(bundle, metadata={"customer": customer.name[:64]})
        self.inbox.submitted(run["id"], customer.tenant)
        return str(run["id"])

    def output(self, customer: Customer, run_id: str, step: int) -> str:
        """A guest's bytes are text here and nothing else."""
        with self._as(customer) as client:
            said = client.output(run_id, step, "stdout") + client.output(run_id, step, "stderr")
        return said.decode(errors="replace")

    def hear(self, headers: Mapping[str, str], body: bytes) -> None:
        """A webhook. Raises WebhookInvalid for what Blastdoor has not signed, or signed long ago."""
        secret = self.inbox.setting("webhook_secret")
        assert secret is not None, "registered before the first request is served"
        self.inbox.receive(verify_webhook(secret, headers, body), by="webhook")

    def _as(self, customer: Customer) -> Client:
        return Client(self.settings.blastdoor_url, self.settings.service_key, tenant=customer.tenant)

    def _enrol(self) -> None:
        """A tenant for each customer, untrusted as all strangers are. Known ones stay as they are."""
        for tenant, name in CUSTOMERS.items():
            try:
                self.blastdoor.tenants.create({"name": tenant, "trust": "untrusted"})
            except Refused as refused:
                if refused.code != "tenant_exists":
                    raise
            self.inbox.add_customer(Customer(tenant, name, secrets.token_urlsafe(16)))

    def _register_webhook(self) -> None:
        """Once. The secret is shown only now; losing it means registering again."""
        known = self.inbox.setting("webhook_id")
        if known in {row["id"] for row in self.blastdoor.webhooks.list()["items"]}:
            return
        made = self.blastdoor.webhooks.create(f"{self.settings.public_url}/webhooks/blastdoor")
        self.inbox.set("webhook_secret", made["secret"])
        self.inbox.set("webhook_id", made["id"])

    def _read(self) -> None:
        """Each process reads under a name of its own, which goes with it."""
        with redis.Redis.from_url(self.settings.redis_url, decode_responses=True) as client:
            consumer = Consumer(
                client,
                name=f"desk-{secrets.token_hex(4)}",
                handle=lambda event: self.inbox.receive(event, by="stream"),
                put_aside=self.inbox.put_aside,
            )
            consumer.run(self._stopping, say=print)


def create(settings: Settings) -> FastAPI:
    desk = MainApp(settings)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        await run_in_threadpool(desk.start)
        yield
        await run_in_threadpool(desk.stop)

    app = FastAPI(title="Discount Desk", lifespan=lifespan, docs_url=None, redoc_url=None, openapi_url=None)
    _serve_customers(app, desk)
    _serve_blastdoor(app, desk)
    return app


def _serve_customers(app: FastAPI, desk: MainApp) -> None:
    def of(link: str) -> Customer:
        customer = desk.inbox.by_link(link)
        if customer is None:
            raise HTTPException(404)
        return customer

    @app.get("/c/{link}")
    def show(link: str) -> HTMLResponse:
        customer = of(link)
        return HTMLResponse(customer_page(customer, desk.inbox.runs_of(customer.tenant), list(SAMPLES)))

    @app.post("/c/{link}/runs")
    def submit(
        link: str, bundle: Annotated[UploadFile | None, File()] = None, sample: Annotated[str, Form()] = ""
    ) -> Response:
        customer = of(link)
        try:
            desk.submit(customer, _chosen(bundle, sample))
        except Refused as refused:  # what Blastdoor says about the upload is for the one who made it
            return HTMLResponse(output_page(customer, "This cannot be tried", refused.detail), refused.status)
        return RedirectResponse(f"/c/{link}", status_code=303)

    @app.get("/c/{link}/runs/{run_id}/{step}")
    def output(link: str, run_id: str, step: int) -> HTMLResponse:
        customer = of(link)
        try:
            text = desk.output(customer, run_id, step)
        except NotFound as error:  # of another customer, or never there: the same
            raise HTTPException(404) from error
        return HTMLResponse(output_page(customer, f"What step {step} printed", text))


def _serve_blastdoor(app: FastAPI, desk: MainApp) -> None:
    @app.post("/webhooks/blastdoor", status_code=204)
    async def webhook(request: Request) -> Response:
        body = b""
        async for chunk in request.stream():
            body += chunk
            if len(body) > MAX_WEBHOOK_BYTES:
                raise HTTPException(413)
        try:
            await run_in_threadpool(desk.hear, request.headers, body)
        except WebhookInvalid as error:
            raise HTTPException(400, "not signed by Blastdoor") from error
        return Response(status_code=204)

    @app.get("/status")
    def status() -> dict[str, Any]:
        """For whoever operates this application; it names no customer."""
        return desk.inbox.counts()


def _chosen(bundle: UploadFile | None, sample: str) -> bytes | Path:
    if bundle is not None and bundle.filename:
        data = bundle.file.read(MAX_UPLOAD_BYTES + 1)
        if len(data) > MAX_UPLOAD_BYTES:
            raise HTTPException(413, "rules of more than 10 MiB")
        return data
    if sample not in SAMPLES:
        raise HTTPException(422, "neither a file nor a sample was chosen")
    return SAMPLES[sample]
