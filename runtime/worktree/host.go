package worktree

import (
	"os"
	"path/filepath"
)

// topLinks are the links in / of a host whose system lies in /usr.
var topLinks = []string{"bin", "sbin", "lib", "lib32", "lib64", "libx32"}

// etcShared are the names in /etc that sandboxes see as the host has them.
// Whatever may hold a secret is not among them.
var etcShared = []string{
	"alternatives", "bash.bashrc", "ca-certificates", "debian_version", "fonts", "inputrc", "java", "ld.so.cache",
	"ld.so.conf", "ld.so.conf.d", "locale.alias", "localtime", "lsb-release", "magic", "mime.types", "nanorc",
	"networks", "nsswitch.conf", "os-release", "perl", "pki/tls/certs", "profile", "profile.d", "protocols",
	"python3", "rpc", "services", "shells", "ssl/certs", "ssl/openssl.cnf", "terminfo", "timezone", "vim",
}

// deviceNodes are the devices that every program expects.
var deviceNodes = []string{"null", "zero", "full", "random", "urandom", "tty"}

// hostBinds are what sandboxes see of their host.
func hostBinds() []bind {
	candidates := []string{"/usr", "/opt"}
	for _, name := range topLinks {
		candidates = append(candidates, "/"+name)
	}
	for _, name := range etcShared {
		candidates = append(candidates, "/etc/"+name)
	}
	var binds []bind
	for _, path := range candidates {
		// Links to a place outside /etc, such as os-release, are followed by the
		// bind; those at the top are made anew.
		info, err := os.Lstat(path)
		if err != nil || info.Mode()&os.ModeSymlink != 0 && filepath.Dir(path) == "/" {
			continue
		}
		if _, err := os.Stat(path); err == nil {
			binds = append(binds, bind{Source: path, Target: path, ReadOnly: true})
		}
	}
	for _, name := range deviceNodes {
		binds = append(binds, bind{Source: "/dev/" + name, Target: "/dev/" + name})
	}
	return binds
}

// etcFiles are the files of /etc that each sandbox has of its own.
func etcFiles(hostname, resolver string) map[string]string {
	files := map[string]string{
		"hostname":    hostname + "\n",
		"hosts":       "127.0.0.1 localhost " + hostname + "\n::1 localhost\n",
		"passwd":      "root:x:0:0:root:" + homeDir + ":/bin/bash\nnobody:x:65534:65534:nobody:/nonexistent:/usr/sbin/nologin\n",
		"group":       "root:x:0:\nnogroup:x:65534:\n",
		"resolv.conf": resolver,
	}
	return files
}
