-- The tables that publishing-queue-postgres.yaml asks, with a few rows to look at: PostgreSQL.

CREATE TABLE clip_variant (
    id bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    platform text NOT NULL,  -- instagram, tiktok, youtube, facebook
    status text NOT NULL     -- draft, ready, published
);
CREATE INDEX clip_variant_ready ON clip_variant (platform) WHERE status = 'ready';

CREATE TABLE publish_log (
    id bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    clip_variant_id bigint NOT NULL REFERENCES clip_variant (id),
    status text NOT NULL,    -- pending, processing, success, failed
    scheduled_for timestamptz NOT NULL,
    published_at timestamptz
);
CREATE INDEX publish_log_status ON publish_log (status, scheduled_for);
CREATE INDEX publish_log_scheduled ON publish_log (scheduled_for);
CREATE INDEX publish_log_published ON publish_log (published_at, scheduled_for);

CREATE TABLE job (
    id bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    status text NOT NULL,    -- pending, processing, done, failed
    worker_id text,
    started_at timestamptz,
    finished_at timestamptz
);
CREATE INDEX job_status ON job (status, worker_id);
CREATE INDEX job_finished ON job (finished_at, started_at);

CREATE TABLE ledger_event (
    id bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    event_type text NOT NULL, -- orchestrator.decision_made, orchestrator.action_executed, orchestrator.run_finished, …
    entity_id text,           -- the decision that was made or executed
    created_at timestamptz NOT NULL
);
CREATE INDEX ledger_event_type ON ledger_event (event_type, created_at);
CREATE INDEX ledger_event_entity ON ledger_event (entity_id, event_type);

INSERT INTO clip_variant (platform, status) VALUES
    ('instagram', 'ready'), ('instagram', 'ready'), ('tiktok', 'ready'), ('youtube', 'ready'), ('facebook', 'draft');
INSERT INTO publish_log (clip_variant_id, status, scheduled_for, published_at) VALUES
    (1, 'pending', now() + interval '30 minutes', NULL),
    (2, 'pending', now() - interval '10 minutes', NULL),
    (3, 'processing', now() - interval '1 minutes', NULL),
    (4, 'success', now() - interval '62 minutes', now() - interval '60 minutes');
INSERT INTO job (status, worker_id, started_at, finished_at) VALUES
    ('pending', NULL, NULL, NULL),
    ('processing', 'worker-1', now() - interval '3 seconds', NULL),
    ('done', 'worker-1', now() - interval '65 seconds', now() - interval '60 seconds');
INSERT INTO ledger_event (event_type, entity_id, created_at) VALUES
    ('orchestrator.decision_made', 'decision-1', now() - interval '30 seconds'),
    ('orchestrator.action_executed', 'decision-1', now() - interval '20 seconds'),
    ('orchestrator.decision_made', 'decision-2', now() - interval '16 seconds'),
    ('orchestrator.run_finished', NULL, now() - interval '15 seconds');
