#!/bin/sh
# Makes Blastdoor's database and its login roles, or gives those that exist their passwords again. What each may do is
# given by `python -m service.main migrate`, from service/adapters/sql/roles.py.
#
# Run as a PostgreSQL superuser; psql takes where from PGHOST, PGPORT, PGUSER, PGPASSWORD. Needs POSTGRES_OWNER_PASSWORD,
# POSTGRES_API_PASSWORD, POSTGRES_RELAY_PASSWORD, POSTGRES_WEBHOOKS_PASSWORD, POSTGRES_WORKER_PASSWORD,
# POSTGRES_REAPER_PASSWORD. BLASTDOOR_DATABASE_ROLES (blastdoor) is the database's name and the beginning of the roles'.

set -eu
: "${BLASTDOOR_DATABASE_ROLES:=blastdoor}"
: "${POSTGRES_OWNER_PASSWORD:?}" "${POSTGRES_API_PASSWORD:?}" "${POSTGRES_RELAY_PASSWORD:?}"
: "${POSTGRES_WEBHOOKS_PASSWORD:?}" "${POSTGRES_WORKER_PASSWORD:?}" "${POSTGRES_REAPER_PASSWORD:?}"
export BLASTDOOR_DATABASE_ROLES

psql --no-psqlrc --quiet --set ON_ERROR_STOP=1 --dbname postgres <<'SQL'
-- Passwords come from the environment and are in no command line; nor in the server's log, should this fail.
SET log_min_error_statement = 'panic';
SET log_statement = 'none';
SET password_encryption = 'scram-sha-256';
\getenv name BLASTDOOR_DATABASE_ROLES
\getenv owner POSTGRES_OWNER_PASSWORD
\getenv api POSTGRES_API_PASSWORD
\getenv relay POSTGRES_RELAY_PASSWORD
\getenv webhooks POSTGRES_WEBHOOKS_PASSWORD
\getenv worker POSTGRES_WORKER_PASSWORD
\getenv reaper POSTGRES_REAPER_PASSWORD

CREATE TEMPORARY TABLE wanted (role text, password text);
INSERT INTO wanted VALUES
    ('owner', :'owner'), ('api', :'api'), ('relay', :'relay'), ('webhooks', :'webhooks'), ('worker', :'worker'),
    ('reaper', :'reaper');
SELECT format('CREATE ROLE %I', :'name' || '_' || role) FROM wanted
    WHERE NOT EXISTS (SELECT FROM pg_roles WHERE rolname = :'name' || '_' || role)
\gexec
SELECT format('ALTER ROLE %I LOGIN NOSUPERUSER NOCREATEDB NOCREATEROLE NOREPLICATION NOBYPASSRLS PASSWORD %L',
    :'name' || '_' || role, password) FROM wanted
\gexec
SELECT format('CREATE DATABASE %I OWNER %I', :'name', :'name' || '_owner')
    WHERE NOT EXISTS (SELECT FROM pg_database WHERE datname = :'name')
\gexec
SQL
