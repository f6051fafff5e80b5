#!/bin/sh
# Starts Redis for Blastdoor: a user for each process, and nobody else (docs/operations.md, "Users of Redis").
#
# Needs REDIS_API_PASSWORD, REDIS_RELAY_PASSWORD, REDIS_WEBHOOKS_PASSWORD, REDIS_WORKER_PASSWORD, REDIS_REAPER_PASSWORD,
# REDIS_APPLICATION_PASSWORD. Arguments are redis-server's own, such as: --dir /data --port 6379
#
# Nobody may use scripts, CONFIG, MODULE, DEBUG, REPLICAOF, KEYS, FLUSHALL or anything else of @dangerous or @scripting;
# INFO is the one exception, for the relay, which must see that a Redis was restarted.

set -euf # no globbing: patterns of keys have stars
umask 077

# Passwords stand in the file as hashes, and in no command line.
sha256() { printf %s "$1" | sha256sum | cut -d ' ' -f 1; }

user() {
    name=$1 password=$2
    shift 2
    echo "user $name on #$(sha256 "$password") resetkeys resetchannels -@all +@connection -@dangerous $*"
}

# A doorbell is a message on a queue of Celery's; a hint is a word on a channel.
ring='~boundary.* +lpush'
hint='&blastdoor:hint:* +publish +subscribe +unsubscribe'
answer='~boundary.* ~_kombu.binding.* ~_kombu.binding_permanent.* ~unacked ~unacked_index ~unacked_mutex
    +brpop +lpush +rpush +llen +sadd +smembers +hset +hget +hdel +zadd +zrem +zrange +set +del +watch +unwatch +multi +exec'
carry='~blastdoor:events +xadd +xtrim +xrange +xpending +xgroup|create +xgroup|destroy +xinfo|stream +xinfo|groups
    +watch +unwatch +multi +exec +info'
consume='~blastdoor:events +xreadgroup +xread +xrange +xlen +xack +xclaim +xautoclaim +xpending
    +xgroup|create +xgroup|createconsumer +xgroup|delconsumer +xinfo|stream +xinfo|groups +xinfo|consumers'

users=$(mktemp)
{
    echo 'user default off'
    echo 'user health on nopass resetkeys resetchannels -@all +ping' # may ask whether Redis is there, and no more
    # shellcheck disable=SC2086
    {
        user api "$REDIS_API_PASSWORD" $ring $hint
        user relay "$REDIS_RELAY_PASSWORD" $ring $hint $carry
        user webhooks "$REDIS_WEBHOOKS_PASSWORD" $hint
        user worker "$REDIS_WORKER_PASSWORD" $answer $hint
        user reaper "$REDIS_REAPER_PASSWORD" $ring $hint
        user application "$REDIS_APPLICATION_PASSWORD" $consume
    }
} >"$users"

unset REDIS_API_PASSWORD REDIS_RELAY_PASSWORD REDIS_WEBHOOKS_PASSWORD REDIS_WORKER_PASSWORD REDIS_REAPER_PASSWORD \
    REDIS_APPLICATION_PASSWORD
# noeviction: a Redis that is full refuses, and what it refuses is said again; one that evicts forgets in silence.
exec redis-server --aclfile "$users" --appendonly yes --appendfsync everysec --save '' --maxmemory-policy noeviction "$@"
