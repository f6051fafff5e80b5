#!/usr/bin/env bash
# Makes every secret that compose.yaml asks for, at random, in .env beside it (mode 0600). What exists is left alone.

set -euo pipefail
cd "$(dirname "$0")/.."
readonly FILE=${1:-.env}

random() { head -c 32 /dev/urandom | base64 | tr '+/' '-_'; }

umask 077
set -o noclobber # and not a test before it: whoever comes second must not overwrite
{
    for name in SUPERUSER OWNER API RELAY WEBHOOKS WORKER REAPER; do
        echo "POSTGRES_${name}_PASSWORD=$(random | tr -d =)"
    done
    for name in API RELAY WEBHOOKS WORKER REAPER APPLICATION; do
        echo "REDIS_${name}_PASSWORD=$(random | tr -d =)"
    done
    echo "BLASTDOOR_SECRETS_KEY=$(random)" # a Fernet key: 32 bytes in base64, padded
} >"$FILE" || {
    echo "$FILE is there already; it keeps its secrets" >&2
    exit 1
}
echo "wrote $FILE, readable for you alone; keep BLASTDOOR_SECRETS_KEY in another place as well"
