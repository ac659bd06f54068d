-- The tables that publishing-queue.yaml asks, with a few rows to look at: SQLite. Times are text in UTC.

CREATE TABLE clip_variant (
    id INTEGER PRIMARY KEY,
    platform TEXT NOT NULL,  -- instagram, tiktok, youtube, facebook
    status TEXT NOT NULL     -- draft, ready, published
);
CREATE INDEX clip_variant_ready ON clip_variant (platform) WHERE status = 'ready';

CREATE TABLE publish_log (
    id INTEGER PRIMARY KEY,
    clip_variant_id INTEGER NOT NULL REFERENCES clip_variant (id),
    status TEXT NOT NULL,    -- pending, processing, success, failed
    scheduled_for TEXT NOT NULL,
    published_at TEXT
);
CREATE INDEX publish_log_status ON publish_log (status, scheduled_for);
CREATE INDEX publish_log_scheduled ON publish_log (scheduled_for);
CREATE INDEX publish_log_published ON publish_log (published_at, scheduled_for);

CREATE TABLE job (
    id INTEGER PRIMARY KEY,
    status TEXT NOT NULL,    -- pending, processing, done, failed
    worker_id TEXT,
    started_at TEXT,
    finished_at TEXT
);
CREATE INDEX job_status ON job (status, worker_id);
CREATE INDEX job_finished ON job (finished_at, started_at);

CREATE TABLE ledger_event (
    id INTEGER PRIMARY KEY,
    event_type TEXT NOT NULL, -- orchestrator.decision_made, orchestrator.action_executed, orchestrator.run_finished, …
    entity_id TEXT,           -- the decision that was made or executed
    created_at TEXT NOT NULL
);
CREATE INDEX ledger_event_type ON ledger_event (event_type, created_at);
CREATE INDEX ledger_event_entity ON ledger_event (entity_id, event_type);

INSERT INTO clip_variant (platform, status) VALUES
    ('instagram', 'ready'), ('instagram', 'ready'), ('tiktok', 'ready'), ('youtube', 'ready'), ('facebook', 'draft');
INSERT INTO publish_log (clip_variant_id, status, scheduled_for, published_at) VALUES
    (1, 'pending', datetime('now', '+30 minutes'), NULL),
    (2, 'pending', datetime('now', '-10 minutes'), NULL),
    (3, 'processing', datetime('now', '-1 minutes'), NULL),
    (4, 'success', datetime('now', '-62 minutes'), datetime('now', '-60 minutes'));
INSERT INTO job (status, worker_id, started_at, finished_at) VALUES
    ('pending', NULL, NULL, NULL),
    ('processing', 'worker-1', datetime('now', '-3 seconds'), NULL),
    ('done', 'worker-1', datetime('now', '-65 seconds'), datetime('now', '-60 seconds'));
INSERT INTO ledger_event (event_type, entity_id, created_at) VALUES
    ('orchestrator.decision_made', 'decision-1', datetime('now', '-30 seconds')),
    ('orchestrator.action_executed', 'decision-1', datetime('now', '-20 seconds')),
    ('orchestrator.decision_made', 'decision-2', datetime('now', '-16 seconds')),
    ('orchestrator.run_finished', NULL, datetime('now', '-15 seconds'));
