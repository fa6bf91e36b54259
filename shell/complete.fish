
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
