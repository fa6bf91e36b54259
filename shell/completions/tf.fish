# Print an optspec for argparse to handle cmd's options that are independent of any subcommand.
function __fish_tf_global_optspecs
    string join \n
end

function __fish_tf_needs_command
    # Figure out if the current invocation already has a command.
    set -l cmd (commandline -opc)
    set -e cmd[1]
    argparse -s (__fish_tf_global_optspecs) -- $cmd 2>/dev/null
    or return
    if set -q argv[1]
        # Also print the command, so this can be used to figure out what it is.
        echo $argv[1]
        return 1
    end
    return 0
end

function __fish_tf_using_subcommand
    set -l cmd (__fish_tf_needs_command)
    test -z "$cmd"
    and return 1
    contains -- $cmd[1] $argv
end

complete -c tf -n "__fish_tf_needs_command" -f -a "locks" -d 'Show who holds terraform\'s state locks, check whether the holder is still running, and release the locks of dead runs'
complete -c tf -n "__fish_tf_using_subcommand locks; and not __fish_seen_subcommand_from list show release audit doctor history recover shell-init shim version" -l chdir -d 'Use the backend of this working directory, like terraform\'s -chdir' -r -F
complete -c tf -n "__fish_tf_using_subcommand locks; and not __fish_seen_subcommand_from list show release audit doctor history recover shell-init shim version" -l table -d 'Look in this DynamoDB table, whatever the current directory is; can be given several times' -r
complete -c tf -n "__fish_tf_using_subcommand locks; and not __fish_seen_subcommand_from list show release audit doctor history recover shell-init shim version" -l bucket -d 'Look at the .tflock objects in this S3 bucket, whatever the current directory is; can be given several times' -r
complete -c tf -n "__fish_tf_using_subcommand locks; and not __fish_seen_subcommand_from list show release audit doctor history recover shell-init shim version" -l from -d 'Also read the tables and buckets in FILE (- for stdin): one on each line, with the options --table or --bucket, --prefix, --region, --profile, --endpoint-url and --rate' -r -F
complete -c tf -n "__fish_tf_using_subcommand locks; and not __fish_seen_subcommand_from list show release audit doctor history recover shell-init shim version" -l prefix -d 'Only look at objects whose key starts with PREFIX' -r
complete -c tf -n "__fish_tf_using_subcommand locks; and not __fish_seen_subcommand_from list show release audit doctor history recover shell-init shim version" -l region -d 'The region of the tables and buckets (default: the region that the AWS CLI would use)' -r
complete -c tf -n "__fish_tf_using_subcommand locks; and not __fish_seen_subcommand_from list show release audit doctor history recover shell-init shim version" -l profile -d 'The AWS profile to use' -r
complete -c tf -n "__fish_tf_using_subcommand locks; and not __fish_seen_subcommand_from list show release audit doctor history recover shell-init shim version" -l endpoint-url -d 'The endpoint URL, for a service that is not AWS itself' -r
complete -c tf -n "__fish_tf_using_subcommand locks; and not __fish_seen_subcommand_from list show release audit doctor history recover shell-init shim version" -l watch -d 'List the locks again every TIME (default: 5s), from 1s to 24h, until ^C; in a pipe, print a line for each change' -r
complete -c tf -n "__fish_tf_using_subcommand locks; and not __fish_seen_subcommand_from list show release audit doctor history recover shell-init shim version" -l rate -d 'Read at most UNITS read capacity units per second (default: 1/4 of the table\'s; no limit if it has none)' -r
complete -c tf -n "__fish_tf_using_subcommand locks; and not __fish_seen_subcommand_from list show release audit doctor history recover shell-init shim version" -l json -d 'Print one JSON object, as described in docs/locks.schema.json'
complete -c tf -n "__fish_tf_using_subcommand locks; and not __fish_seen_subcommand_from list show release audit doctor history recover shell-init shim version" -s V -l version -d 'Print version'
complete -c tf -n "__fish_tf_using_subcommand locks; and not __fish_seen_subcommand_from list show release audit doctor history recover shell-init shim version" -f -a "list" -d 'List all locks in this directory\'s backend, in a DynamoDB table or in an S3 bucket'
complete -c tf -n "__fish_tf_using_subcommand locks; and not __fish_seen_subcommand_from list show release audit doctor history recover shell-init shim version" -f -a "show" -d 'Show one lock and all evidence for and against its holder being alive'
complete -c tf -n "__fish_tf_using_subcommand locks; and not __fish_seen_subcommand_from list show release audit doctor history recover shell-init shim version" -f -a "release" -d 'Release a lock if its holder is dead; ask if it is likely dead; refuse if it is alive or unknown'
complete -c tf -n "__fish_tf_using_subcommand locks; and not __fish_seen_subcommand_from list show release audit doctor history recover shell-init shim version" -f -a "audit" -d 'Count all locks, for a scheduled job; exit with 2 if any lock is stale'
complete -c tf -n "__fish_tf_using_subcommand locks; and not __fish_seen_subcommand_from list show release audit doctor history recover shell-init shim version" -f -a "doctor" -d 'Check everything that a release in this directory needs; fix a state\'s digest'
complete -c tf -n "__fish_tf_using_subcommand locks; and not __fish_seen_subcommand_from list show release audit doctor history recover shell-init shim version" -f -a "history" -d 'Show past releases, forced releases, refused releases, takeovers and replaced locks'
complete -c tf -n "__fish_tf_using_subcommand locks; and not __fish_seen_subcommand_from list show release audit doctor history recover shell-init shim version" -f -a "recover" -d 'Release the locks that dead runs on this host left, and print one line for each'
complete -c tf -n "__fish_tf_using_subcommand locks; and not __fish_seen_subcommand_from list show release audit doctor history recover shell-init shim version" -f -a "shell-init" -d 'Print shell code that defines the alias `terraform=tf` and Tab completion for both names'
complete -c tf -n "__fish_tf_using_subcommand locks; and not __fish_seen_subcommand_from list show release audit doctor history recover shell-init shim version" -f -a "shim" -d 'Create links named terraform and tofu in a directory, for scripts, which do not see aliases'
complete -c tf -n "__fish_tf_using_subcommand locks; and not __fish_seen_subcommand_from list show release audit doctor history recover shell-init shim version" -f -a "version" -d 'Print the version, commit and target of tf, and the terraform that it would run'
complete -c tf -n "__fish_tf_using_subcommand locks; and __fish_seen_subcommand_from list" -l chdir -d 'Use the backend of this working directory, like terraform\'s -chdir' -r -F
complete -c tf -n "__fish_tf_using_subcommand locks; and __fish_seen_subcommand_from list" -l table -d 'Look in this DynamoDB table, whatever the current directory is; can be given several times' -r
complete -c tf -n "__fish_tf_using_subcommand locks; and __fish_seen_subcommand_from list" -l bucket -d 'Look at the .tflock objects in this S3 bucket, whatever the current directory is; can be given several times' -r
complete -c tf -n "__fish_tf_using_subcommand locks; and __fish_seen_subcommand_from list" -l from -d 'Also read the tables and buckets in FILE (- for stdin): one on each line, with the options --table or --bucket, --prefix, --region, --profile, --endpoint-url and --rate' -r -F
complete -c tf -n "__fish_tf_using_subcommand locks; and __fish_seen_subcommand_from list" -l prefix -d 'Only look at objects whose key starts with PREFIX' -r
complete -c tf -n "__fish_tf_using_subcommand locks; and __fish_seen_subcommand_from list" -l region -d 'The region of the tables and buckets (default: the region that the AWS CLI would use)' -r
complete -c tf -n "__fish_tf_using_subcommand locks; and __fish_seen_subcommand_from list" -l profile -d 'The AWS profile to use' -r
complete -c tf -n "__fish_tf_using_subcommand locks; and __fish_seen_subcommand_from list" -l endpoint-url -d 'The endpoint URL, for a service that is not AWS itself' -r
complete -c tf -n "__fish_tf_using_subcommand locks; and __fish_seen_subcommand_from list" -l watch -d 'List the locks again every TIME (default: 5s), from 1s to 24h, until ^C; in a pipe, print a line for each change' -r
complete -c tf -n "__fish_tf_using_subcommand locks; and __fish_seen_subcommand_from list" -l rate -d 'Read at most UNITS read capacity units per second (default: 1/4 of the table\'s; no limit if it has none)' -r
complete -c tf -n "__fish_tf_using_subcommand locks; and __fish_seen_subcommand_from list" -l json -d 'Print one JSON object, as described in docs/locks.schema.json'
complete -c tf -n "__fish_tf_using_subcommand locks; and __fish_seen_subcommand_from show" -l chdir -d 'Use the backend of this working directory, like terraform\'s -chdir' -r -F
complete -c tf -n "__fish_tf_using_subcommand locks; and __fish_seen_subcommand_from show" -l table -d 'Look in this DynamoDB table, whatever the current directory is' -r
complete -c tf -n "__fish_tf_using_subcommand locks; and __fish_seen_subcommand_from show" -l bucket -d 'Look at the .tflock objects in this S3 bucket, whatever the current directory is' -r
complete -c tf -n "__fish_tf_using_subcommand locks; and __fish_seen_subcommand_from show" -l prefix -d 'Only look at objects whose key starts with PREFIX' -r
complete -c tf -n "__fish_tf_using_subcommand locks; and __fish_seen_subcommand_from show" -l region -d 'The region of the table or bucket (default: the region that the AWS CLI would use)' -r
complete -c tf -n "__fish_tf_using_subcommand locks; and __fish_seen_subcommand_from show" -l profile -d 'The AWS profile to use' -r
complete -c tf -n "__fish_tf_using_subcommand locks; and __fish_seen_subcommand_from show" -l endpoint-url -d 'The endpoint URL, for a service that is not AWS itself' -r
complete -c tf -n "__fish_tf_using_subcommand locks; and __fish_seen_subcommand_from show" -l json -d 'Print the JSON of `tf locks list --json`, for this lock only'
complete -c tf -n "__fish_tf_using_subcommand locks; and __fish_seen_subcommand_from release" -l chdir -d 'Use the backend of this working directory, like terraform\'s -chdir' -r -F
complete -c tf -n "__fish_tf_using_subcommand locks; and __fish_seen_subcommand_from release" -l table -d 'Look in this DynamoDB table, whatever the current directory is' -r
complete -c tf -n "__fish_tf_using_subcommand locks; and __fish_seen_subcommand_from release" -l bucket -d 'Look at the .tflock objects in this S3 bucket, whatever the current directory is' -r
complete -c tf -n "__fish_tf_using_subcommand locks; and __fish_seen_subcommand_from release" -l prefix -d 'Only look at objects whose key starts with PREFIX' -r
complete -c tf -n "__fish_tf_using_subcommand locks; and __fish_seen_subcommand_from release" -l region -d 'The region of the table or bucket (default: the region that the AWS CLI would use)' -r
complete -c tf -n "__fish_tf_using_subcommand locks; and __fish_seen_subcommand_from release" -l profile -d 'The AWS profile to use' -r
complete -c tf -n "__fish_tf_using_subcommand locks; and __fish_seen_subcommand_from release" -l endpoint-url -d 'The endpoint URL, for a service that is not AWS itself' -r
complete -c tf -n "__fish_tf_using_subcommand locks; and __fish_seen_subcommand_from release" -l force -d 'Release the lock with this full ID, even if its holder is alive or unknown' -r
complete -c tf -n "__fish_tf_using_subcommand locks; and __fish_seen_subcommand_from release" -l reason -d 'The reason, for the history' -r
complete -c tf -n "__fish_tf_using_subcommand locks; and __fish_seen_subcommand_from release" -l no-lock -d 'Only delete an item or object that is in a lock\'s place and is not a lock'
complete -c tf -n "__fish_tf_using_subcommand locks; and __fish_seen_subcommand_from release" -s y -l yes -d 'Do not ask for confirmation'
complete -c tf -n "__fish_tf_using_subcommand locks; and __fish_seen_subcommand_from release" -l dry-run -d 'Only print what would be done'
complete -c tf -n "__fish_tf_using_subcommand locks; and __fish_seen_subcommand_from audit" -l older-than -d 'Only count locks older than this as stale: 90s, 45m, 2h, 3d' -r
complete -c tf -n "__fish_tf_using_subcommand locks; and __fish_seen_subcommand_from audit" -l chdir -d 'Use the backend of this working directory, like terraform\'s -chdir' -r -F
complete -c tf -n "__fish_tf_using_subcommand locks; and __fish_seen_subcommand_from audit" -l table -d 'Look in this DynamoDB table, whatever the current directory is; can be given several times' -r
complete -c tf -n "__fish_tf_using_subcommand locks; and __fish_seen_subcommand_from audit" -l bucket -d 'Look at the .tflock objects in this S3 bucket, whatever the current directory is; can be given several times' -r
complete -c tf -n "__fish_tf_using_subcommand locks; and __fish_seen_subcommand_from audit" -l from -d 'Also read the tables and buckets in FILE (- for stdin): one on each line, with the options --table or --bucket, --prefix, --region, --profile, --endpoint-url and --rate' -r -F
complete -c tf -n "__fish_tf_using_subcommand locks; and __fish_seen_subcommand_from audit" -l prefix -d 'Only look at objects whose key starts with PREFIX' -r
complete -c tf -n "__fish_tf_using_subcommand locks; and __fish_seen_subcommand_from audit" -l region -d 'The region of the tables and buckets (default: the region that the AWS CLI would use)' -r
complete -c tf -n "__fish_tf_using_subcommand locks; and __fish_seen_subcommand_from audit" -l profile -d 'The AWS profile to use' -r
complete -c tf -n "__fish_tf_using_subcommand locks; and __fish_seen_subcommand_from audit" -l endpoint-url -d 'The endpoint URL, for a service that is not AWS itself' -r
complete -c tf -n "__fish_tf_using_subcommand locks; and __fish_seen_subcommand_from audit" -l rate -d 'Read at most UNITS read capacity units per second (default: 1/4 of the table\'s; no limit if it has none)' -r
complete -c tf -n "__fish_tf_using_subcommand locks; and __fish_seen_subcommand_from audit" -l json -d 'Print one JSON object with the counts and the stale locks'
complete -c tf -n "__fish_tf_using_subcommand locks; and __fish_seen_subcommand_from audit" -l prometheus -d 'Print metrics in the Prometheus text format'
complete -c tf -n "__fish_tf_using_subcommand locks; and __fish_seen_subcommand_from doctor" -l chdir -d 'The working directory, as terraform\'s own -chdir' -r -F
complete -c tf -n "__fish_tf_using_subcommand locks; and __fish_seen_subcommand_from doctor" -l fix-digest -d 'Make the recorded digest of a workspace\'s state match the state, while holding its lock' -r
complete -c tf -n "__fish_tf_using_subcommand locks; and __fish_seen_subcommand_from doctor" -s y -l yes -d 'Do not ask for confirmation'
complete -c tf -n "__fish_tf_using_subcommand locks; and __fish_seen_subcommand_from doctor" -l dry-run -d 'Only print what would be done'
complete -c tf -n "__fish_tf_using_subcommand locks; and __fish_seen_subcommand_from history" -l since -d 'Only show events since TIME: a duration (90m, 2h, 7d), a date (2026-11-27, in UTC) or a time (2026-11-27T08:00:00Z)' -r
complete -c tf -n "__fish_tf_using_subcommand locks; and __fish_seen_subcommand_from history" -l path -d 'Only show locks whose path (bucket/key) is PATH or below it' -r
complete -c tf -n "__fish_tf_using_subcommand locks; and __fish_seen_subcommand_from history" -l html -d 'Write one HTML page with a timeline to FILE (- for stdout)' -r -F
complete -c tf -n "__fish_tf_using_subcommand locks; and __fish_seen_subcommand_from history" -l json -d 'Print one JSON object whose `events` are the lines of the history, oldest first'
complete -c tf -n "__fish_tf_using_subcommand locks; and __fish_seen_subcommand_from recover" -l forget -d 'Drop the record of this lock, which no longer exists; nothing is released' -r
complete -c tf -n "__fish_tf_using_subcommand locks; and __fish_seen_subcommand_from recover" -l run -d 'Only recover this run of the journal' -r
complete -c tf -n "__fish_tf_using_subcommand locks; and __fish_seen_subcommand_from recover" -l reason -d 'The reason, for the history' -r
complete -c tf -n "__fish_tf_using_subcommand locks; and __fish_seen_subcommand_from recover" -l dry-run -d 'Only print what would be done'
complete -c tf -n "__fish_tf_using_subcommand locks; and __fish_seen_subcommand_from recover" -l say -d 'Print to stderr, as tf does before it starts terraform'
complete -c tf -n "__fish_tf_using_subcommand locks; and __fish_seen_subcommand_from recover" -l again -d 'Do not report locks that could not be released, because they were reported before'
complete -c tf -n "__fish_tf_using_subcommand locks; and __fish_seen_subcommand_from shell-init" -l no-alias -d 'Do not define the alias `terraform`; only complete `tf`'
complete -c tf -n "__fish_tf_using_subcommand locks; and __fish_seen_subcommand_from shim" -l only -d 'Only this name, for a script that uses tofu whenever it finds tofu on PATH' -r -f -a "terraform\t''
tofu\t''"
complete -c tf -n "__fish_tf_using_subcommand locks; and __fish_seen_subcommand_from shim" -l remove -d 'Remove the links again, but only links to this program, and the directory if it is empty then'
complete -c tf -n "__fish_tf_using_subcommand locks; and __fish_seen_subcommand_from version" -l chdir -d 'The working directory, as terraform\'s own -chdir' -r -F
complete -c tf -n "__fish_tf_using_subcommand locks; and __fish_seen_subcommand_from version" -l json -d 'Print one JSON object'

# The program that is asked. What `tf locks shell-init` prints says its path, where it is not on PATH.
set -g __tf_program tf

# The first word that is a command, behind any -chdir=DIR; fails if there is one.
function __fish_tf_needs_command
    set -l words (commandline -opc)
    for word in $words[2..]
        if not string match -q -- '-chdir=*' $word
            echo $word
            return 1
        end
    end
    return 0
end

# Terraform's own words, as terraform says them: it is told as bash tells it (`complete -C`).
function __tf_of_terraform
    set -lx COMP_LINE (commandline -cp)
    set -lx COMP_POINT (string length -- $COMP_LINE)
    $__tf_program 2>/dev/null
end

complete -c tf -n "not __fish_tf_using_subcommand locks" -f -a "(__tf_of_terraform)"
