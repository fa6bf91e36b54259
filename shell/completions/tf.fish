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

complete -c tf -n "__fish_tf_needs_command" -f -a "locks" -d 'See who holds terraform\'s state locks, whether that holder lives, and release what is proven dead'
complete -c tf -n "__fish_tf_using_subcommand locks; and not __fish_seen_subcommand_from list show release audit doctor history recover shell-init shim" -l chdir -d 'The working directory whose backend is meant, as terraform\'s own -chdir' -r -F
complete -c tf -n "__fish_tf_using_subcommand locks; and not __fish_seen_subcommand_from list show release audit doctor history recover shell-init shim" -l table -d 'Look into this DynamoDB table, outside of any working directory' -r
complete -c tf -n "__fish_tf_using_subcommand locks; and not __fish_seen_subcommand_from list show release audit doctor history recover shell-init shim" -l bucket -d 'Look at the .tflock objects of this bucket, outside of any working directory' -r
complete -c tf -n "__fish_tf_using_subcommand locks; and not __fish_seen_subcommand_from list show release audit doctor history recover shell-init shim" -l prefix -d 'Only objects whose key begins so' -r
complete -c tf -n "__fish_tf_using_subcommand locks; and not __fish_seen_subcommand_from list show release audit doctor history recover shell-init shim" -l region -d 'The region of the table or bucket (else as the AWS CLI finds it)' -r
complete -c tf -n "__fish_tf_using_subcommand locks; and not __fish_seen_subcommand_from list show release audit doctor history recover shell-init shim" -l profile -d 'The profile to use' -r
complete -c tf -n "__fish_tf_using_subcommand locks; and not __fish_seen_subcommand_from list show release audit doctor history recover shell-init shim" -l endpoint-url -d 'The endpoint, for what is not AWS itself' -r
complete -c tf -n "__fish_tf_using_subcommand locks; and not __fish_seen_subcommand_from list show release audit doctor history recover shell-init shim" -l rate -d 'Use at most so many read capacity units a second (else a quarter of a provisioned table\'s, and no limit for a table that is paid for by request)' -r
complete -c tf -n "__fish_tf_using_subcommand locks; and not __fish_seen_subcommand_from list show release audit doctor history recover shell-init shim" -l json -d 'One JSON object, as docs/locks.schema.json describes it'
complete -c tf -n "__fish_tf_using_subcommand locks; and not __fish_seen_subcommand_from list show release audit doctor history recover shell-init shim" -s V -l version -d 'Print version'
complete -c tf -n "__fish_tf_using_subcommand locks; and not __fish_seen_subcommand_from list show release audit doctor history recover shell-init shim" -f -a "list" -d 'Every lock of this directory\'s backend, of a table or of a bucket'
complete -c tf -n "__fish_tf_using_subcommand locks; and not __fish_seen_subcommand_from list show release audit doctor history recover shell-init shim" -f -a "show" -d 'One lock, and every piece of evidence for and against its holder being alive'
complete -c tf -n "__fish_tf_using_subcommand locks; and not __fish_seen_subcommand_from list show release audit doctor history recover shell-init shim" -f -a "release" -d 'Release a lock whose holder is proven dead; ask if it is likely dead; refuse if it is alive'
complete -c tf -n "__fish_tf_using_subcommand locks; and not __fish_seen_subcommand_from list show release audit doctor history recover shell-init shim" -f -a "audit" -d 'For a schedule: count what stands, and end with 2 if something is stale'
complete -c tf -n "__fish_tf_using_subcommand locks; and not __fish_seen_subcommand_from list show release audit doctor history recover shell-init shim" -f -a "doctor" -d 'Try everything that a release in this directory needs; mend a digest'
complete -c tf -n "__fish_tf_using_subcommand locks; and not __fish_seen_subcommand_from list show release audit doctor history recover shell-init shim" -f -a "history" -d 'What was released, forced and refused'
complete -c tf -n "__fish_tf_using_subcommand locks; and not __fish_seen_subcommand_from list show release audit doctor history recover shell-init shim" -f -a "recover" -d 'Finish what dead runs on this host have left: give their locks back, a line for each'
complete -c tf -n "__fish_tf_using_subcommand locks; and not __fish_seen_subcommand_from list show release audit doctor history recover shell-init shim" -f -a "shell-init" -d 'Print what a shell has to read: the alias `terraform=tf`, and what completes both'
complete -c tf -n "__fish_tf_using_subcommand locks; and not __fish_seen_subcommand_from list show release audit doctor history recover shell-init shim" -f -a "shim" -d 'Put links named terraform and tofu into a directory, for scripts, which see no alias'
complete -c tf -n "__fish_tf_using_subcommand locks; and __fish_seen_subcommand_from list" -l chdir -d 'The working directory whose backend is meant, as terraform\'s own -chdir' -r -F
complete -c tf -n "__fish_tf_using_subcommand locks; and __fish_seen_subcommand_from list" -l table -d 'Look into this DynamoDB table, outside of any working directory' -r
complete -c tf -n "__fish_tf_using_subcommand locks; and __fish_seen_subcommand_from list" -l bucket -d 'Look at the .tflock objects of this bucket, outside of any working directory' -r
complete -c tf -n "__fish_tf_using_subcommand locks; and __fish_seen_subcommand_from list" -l prefix -d 'Only objects whose key begins so' -r
complete -c tf -n "__fish_tf_using_subcommand locks; and __fish_seen_subcommand_from list" -l region -d 'The region of the table or bucket (else as the AWS CLI finds it)' -r
complete -c tf -n "__fish_tf_using_subcommand locks; and __fish_seen_subcommand_from list" -l profile -d 'The profile to use' -r
complete -c tf -n "__fish_tf_using_subcommand locks; and __fish_seen_subcommand_from list" -l endpoint-url -d 'The endpoint, for what is not AWS itself' -r
complete -c tf -n "__fish_tf_using_subcommand locks; and __fish_seen_subcommand_from list" -l rate -d 'Use at most so many read capacity units a second (else a quarter of a provisioned table\'s, and no limit for a table that is paid for by request)' -r
complete -c tf -n "__fish_tf_using_subcommand locks; and __fish_seen_subcommand_from list" -l json -d 'One JSON object, as docs/locks.schema.json describes it'
complete -c tf -n "__fish_tf_using_subcommand locks; and __fish_seen_subcommand_from show" -l chdir -d 'The working directory whose backend is meant, as terraform\'s own -chdir' -r -F
complete -c tf -n "__fish_tf_using_subcommand locks; and __fish_seen_subcommand_from show" -l table -d 'Look into this DynamoDB table, outside of any working directory' -r
complete -c tf -n "__fish_tf_using_subcommand locks; and __fish_seen_subcommand_from show" -l bucket -d 'Look at the .tflock objects of this bucket, outside of any working directory' -r
complete -c tf -n "__fish_tf_using_subcommand locks; and __fish_seen_subcommand_from show" -l prefix -d 'Only objects whose key begins so' -r
complete -c tf -n "__fish_tf_using_subcommand locks; and __fish_seen_subcommand_from show" -l region -d 'The region of the table or bucket (else as the AWS CLI finds it)' -r
complete -c tf -n "__fish_tf_using_subcommand locks; and __fish_seen_subcommand_from show" -l profile -d 'The profile to use' -r
complete -c tf -n "__fish_tf_using_subcommand locks; and __fish_seen_subcommand_from show" -l endpoint-url -d 'The endpoint, for what is not AWS itself' -r
complete -c tf -n "__fish_tf_using_subcommand locks; and __fish_seen_subcommand_from show" -l json -d 'The same JSON as `tf locks list --json`, with this lock alone'
complete -c tf -n "__fish_tf_using_subcommand locks; and __fish_seen_subcommand_from release" -l chdir -d 'The working directory whose backend is meant, as terraform\'s own -chdir' -r -F
complete -c tf -n "__fish_tf_using_subcommand locks; and __fish_seen_subcommand_from release" -l table -d 'Look into this DynamoDB table, outside of any working directory' -r
complete -c tf -n "__fish_tf_using_subcommand locks; and __fish_seen_subcommand_from release" -l bucket -d 'Look at the .tflock objects of this bucket, outside of any working directory' -r
complete -c tf -n "__fish_tf_using_subcommand locks; and __fish_seen_subcommand_from release" -l prefix -d 'Only objects whose key begins so' -r
complete -c tf -n "__fish_tf_using_subcommand locks; and __fish_seen_subcommand_from release" -l region -d 'The region of the table or bucket (else as the AWS CLI finds it)' -r
complete -c tf -n "__fish_tf_using_subcommand locks; and __fish_seen_subcommand_from release" -l profile -d 'The profile to use' -r
complete -c tf -n "__fish_tf_using_subcommand locks; and __fish_seen_subcommand_from release" -l endpoint-url -d 'The endpoint, for what is not AWS itself' -r
complete -c tf -n "__fish_tf_using_subcommand locks; and __fish_seen_subcommand_from release" -l force -d 'Release the lock with this full ID, whatever is believed of its holder' -r
complete -c tf -n "__fish_tf_using_subcommand locks; and __fish_seen_subcommand_from release" -l reason -d 'Why, for the history' -r
complete -c tf -n "__fish_tf_using_subcommand locks; and __fish_seen_subcommand_from release" -l no-lock -d 'Release what is in the place of a lock and is none, and no lock'
complete -c tf -n "__fish_tf_using_subcommand locks; and __fish_seen_subcommand_from release" -s y -l yes -d 'Answer yes where it would ask'
complete -c tf -n "__fish_tf_using_subcommand locks; and __fish_seen_subcommand_from release" -l dry-run -d 'Only say what would be done'
complete -c tf -n "__fish_tf_using_subcommand locks; and __fish_seen_subcommand_from audit" -l older-than -d 'Only locks older than this count: 90s, 45m, 2h, 3d' -r
complete -c tf -n "__fish_tf_using_subcommand locks; and __fish_seen_subcommand_from audit" -l chdir -d 'The working directory whose backend is meant, as terraform\'s own -chdir' -r -F
complete -c tf -n "__fish_tf_using_subcommand locks; and __fish_seen_subcommand_from audit" -l table -d 'Look into this DynamoDB table, outside of any working directory' -r
complete -c tf -n "__fish_tf_using_subcommand locks; and __fish_seen_subcommand_from audit" -l bucket -d 'Look at the .tflock objects of this bucket, outside of any working directory' -r
complete -c tf -n "__fish_tf_using_subcommand locks; and __fish_seen_subcommand_from audit" -l prefix -d 'Only objects whose key begins so' -r
complete -c tf -n "__fish_tf_using_subcommand locks; and __fish_seen_subcommand_from audit" -l region -d 'The region of the table or bucket (else as the AWS CLI finds it)' -r
complete -c tf -n "__fish_tf_using_subcommand locks; and __fish_seen_subcommand_from audit" -l profile -d 'The profile to use' -r
complete -c tf -n "__fish_tf_using_subcommand locks; and __fish_seen_subcommand_from audit" -l endpoint-url -d 'The endpoint, for what is not AWS itself' -r
complete -c tf -n "__fish_tf_using_subcommand locks; and __fish_seen_subcommand_from audit" -l rate -d 'Use at most so many read capacity units a second (else a quarter of a provisioned table\'s, and no limit for a table that is paid for by request)' -r
complete -c tf -n "__fish_tf_using_subcommand locks; and __fish_seen_subcommand_from audit" -l json -d 'One JSON object with the counts'
complete -c tf -n "__fish_tf_using_subcommand locks; and __fish_seen_subcommand_from audit" -l prometheus -d 'Metrics in the text format of Prometheus'
complete -c tf -n "__fish_tf_using_subcommand locks; and __fish_seen_subcommand_from doctor" -l chdir -d 'The working directory, as terraform\'s own -chdir' -r -F
complete -c tf -n "__fish_tf_using_subcommand locks; and __fish_seen_subcommand_from doctor" -l fix-digest -d 'Set the digest of a workspace\'s state to what the state has, holding its lock' -r
complete -c tf -n "__fish_tf_using_subcommand locks; and __fish_seen_subcommand_from doctor" -s y -l yes -d 'Answer yes where it would ask'
complete -c tf -n "__fish_tf_using_subcommand locks; and __fish_seen_subcommand_from doctor" -l dry-run -d 'Only say what would be done'
complete -c tf -n "__fish_tf_using_subcommand locks; and __fish_seen_subcommand_from history" -l json -d 'One JSON object: its `events` are the lines of the file, the oldest first'
complete -c tf -n "__fish_tf_using_subcommand locks; and __fish_seen_subcommand_from recover" -l forget -d 'Drop the record of this lock, which is gone; nothing is released' -r
complete -c tf -n "__fish_tf_using_subcommand locks; and __fish_seen_subcommand_from recover" -l run -d 'Only this run of the journal' -r
complete -c tf -n "__fish_tf_using_subcommand locks; and __fish_seen_subcommand_from recover" -l reason -d 'Why, for the history' -r
complete -c tf -n "__fish_tf_using_subcommand locks; and __fish_seen_subcommand_from recover" -l dry-run -d 'Only say what would be finished'
complete -c tf -n "__fish_tf_using_subcommand locks; and __fish_seen_subcommand_from recover" -l say -d 'On stderr, as what tf says in front of terraform'
complete -c tf -n "__fish_tf_using_subcommand locks; and __fish_seen_subcommand_from recover" -l again -d 'Say nothing of what could not be done: it was said before'
complete -c tf -n "__fish_tf_using_subcommand locks; and __fish_seen_subcommand_from shell-init" -l no-alias -d 'Leave `terraform` what it is: only complete `tf`'
complete -c tf -n "__fish_tf_using_subcommand locks; and __fish_seen_subcommand_from shim" -l only -d 'Only this name, where a script would take a tofu on PATH for a reason to use it' -r -f -a "terraform\t''
tofu\t''"
complete -c tf -n "__fish_tf_using_subcommand locks; and __fish_seen_subcommand_from shim" -l remove -d 'Take the links away again. Only what is a link to this program goes'

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
