/* Linked into the static binary alone, by package/build.
 *
 * The C library looks names up through modules that /etc/nsswitch.conf lists, and loads from the host those that are not
 * "files" or "dns". A static binary brings its own C library, and a module of a host with another version of it ends the
 * process: seen with Debian 13's libnss_resolve, libnss_myhostname and libnss_mdns4_minimal, each a SIGFPE in the first
 * look-up, which is where a lock would have been given back. So only what is built in is asked. Terraform, written in Go
 * and linked statically too, asks no other either.
 */
#include <nss.h>

__attribute__((constructor)) static void ask_only_what_is_built_in(void)
{
    static const char *const databases[] = {"aliases", "ethers", "group", "gshadow", "initgroups", "netgroup",
        "networks", "passwd", "protocols", "publickey", "rpc", "services", "shadow"};
    for (unsigned i = 0; i < sizeof databases / sizeof *databases; i++)
        __nss_configure_lookup(databases[i], "files");
    __nss_configure_lookup("hosts", "files dns");
}
