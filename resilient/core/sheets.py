"""Sheets: the messages that an agent fills in from its assignment and its crew.

Think of the forms in a stage office: which box gets what is written here, and when a form is handed out in agent.py.

Contract: pure functions; nothing is decided.
"""

from __future__ import annotations

from resilient.core.crew import Crew, Findings, Place, Worker
from resilient.core.machine import AgentSettings, Fork, Seals, VaultDo, Vaulted
from resilient.core.messages import Assignment, Pace, Refused, Report, Seated


def fork(new: Assignment, worker: Worker, restart: int) -> Fork:
    """How to start this worker."""
    return Fork(
        worker=worker.name,
        role=worker.role,
        rank=worker.rank,
        local_rank=worker.local_rank,
        world_size=new.world_size,
        local_world_size=len(new.seats),
        node_rank=new.node_rank,
        nodes=new.nodes,
        store=new.store,
        restart=restart,
        round=new.round,
    )


def seated(new: Assignment, place: Place, every: dict[int, Seals]) -> Seated:
    """Which chair its worker holds, and where the chair's copies lie. every: what this node's memory holds, by rank."""
    copied = new.plan.tier in ("memory", "peer", "persistent")
    seals = every.get(place.rank) or Seals()
    giver = every.get(new.plan.lender) or seals
    return Seated(
        round=new.round,
        rank=place.rank,
        local_rank=place.local_rank,
        world_size=new.world_size,
        node_rank=new.node_rank,
        nodes=new.nodes,
        local_world_size=len(new.seats),
        store=new.store,
        plan=new.plan,
        snapshot=giver.snapshots.get(new.plan.step, "") if copied else "",
        own=seals.own,
        own_bytes=seals.own_bytes,
    )


def vault_do(new: Assignment) -> VaultDo:
    """What the vault should be doing."""
    return VaultDo(
        peers=new.peers,
        fetch=new.fetch,
        commit=new.commit,
        manifest=new.manifest,
        world_size=new.world_size,
        ranks=tuple(sorted(seat.rank for seat in new.seats)),
        checkpoint=new.checkpoint,
        rescue=new.rescue,
        distrusted=new.distrusted,
        group=new.group,
        round=new.round if new.round > new.fence else 0,
        step=new.plan.step,
        node_rank=new.node_rank,
        compare=new.compare,
        elders=new.elders,
    )


def report(
    settings: AgentSettings,
    crew: Crew,
    vault: Vaulted,
    seals: dict[int, Seals],
    refused: list[Refused],
    findings: Findings,
    now: float,
) -> Report:
    """Everything but the agent's own words and counters (seq, round, fenced, assigned ...), which it adds itself."""
    return Report(
        run=settings.run,
        node=settings.node,
        boot=settings.boot,
        seq=0,
        host=settings.host,
        data_port=settings.data_port,
        data_host=settings.data_host,
        failure_domain=settings.failure_domain,
        slots=settings.slots,
        spares=settings.standbys,
        node_rank=settings.node_rank,
        chairs=tuple(place.chair(seals.get(rank) or Seals()) for rank, place in sorted(crew.places.items())),
        standbys=tuple(worker.standby() for worker in crew.standbys()),
        findings=findings.aged(now),
        holdings=vault.holdings,
        persisted=vault.persisted,
        refused=(*refused, *vault.refused),
        available=vault.available,
        fetched=tuple(sorted({f.rank for f in vault.fetched})),
        committed=vault.committed,
        parities=vault.parities,
        pace=_pace(crew),
        past=vault.past,
        audit=vault.audit,
        compared=vault.compared,
    )


def _pace(crew: Crew) -> Pace | None:
    """Of rank 0, which stands for all."""
    first = crew.places.get(0)
    return first.worker.pace if first is not None and first.worker is not None else None


def sketch(it: Report) -> object:
    """What of a report somebody waits for: a change of this is reported at once, of the rest with the next report."""
    chairs = [(c.worker, c.state, c.pid, c.layout, c.record is not None and c.record.committed_s > 0) for c in it.chairs]
    vault = (it.persisted, it.refused, it.available, it.fetched, it.committed, it.compared)
    newest = it.findings[-1].seq if it.findings else 0
    return (chairs, it.standbys, newest, vault, it.round, it.fenced, it.store, it.managed, it.leaving, it.assigned, it.admitted)
