package main

import (
	"bufio"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"github.com/atoll-run/atoll/chunk"
	"github.com/atoll-run/atoll/node"
	"github.com/atoll-run/atoll/sandbox"
)

// usageError is a command line that makes no sense.
func usageError(subject, hint, format string, args ...any) error {
	return sandbox.Errorf("atoll", sandbox.Invalid, subject, format, args...).WithHint(hint)
}

// parsePort reads "[HOSTIP:][HOST:]GUEST[/tcp]"; a host port of 0 or none lets
// the host choose.
func parsePort(s string) (node.Port, error) {
	bad := func(why string) (node.Port, error) {
		return node.Port{}, usageError(s, "write -p [ADDRESS:][HOST:]GUEST, for example -p 8080:80", "%s", why)
	}
	rest, proto, ok := strings.Cut(s, "/")
	if ok && proto != "tcp" {
		return bad("only tcp ports can be published")
	}
	ip, host := "", ""
	guest := rest
	if i := strings.LastIndexByte(rest, ':'); i >= 0 {
		host, guest = rest[:i], rest[i+1:]
		if j := strings.LastIndexByte(host, ':'); j >= 0 {
			ip, host = strings.Trim(host[:j], "[]"), host[j+1:]
			if net.ParseIP(ip) == nil {
				return bad(fmt.Sprintf("%q is no IP address", ip))
			}
		}
	}
	p := node.Port{HostIP: ip}
	var err error
	if p.Guest, err = strconv.Atoi(guest); err != nil || p.Guest < 1 || p.Guest > 65535 {
		return bad("the port inside is a number from 1 to 65535")
	}
	if host != "" {
		if p.Host, err = strconv.Atoi(host); err != nil || p.Host < 0 || p.Host > 65535 {
			return bad("the port outside is a number from 0 to 65535")
		}
	}
	return p, nil
}

// parseVolume reads "SOURCE:TARGET[:ro|rw]". A source with a slash, or that
// begins with a dot or tilde, is a path on this host; any other names a volume.
func parseVolume(s string) (mount *sandbox.Mount, volume *node.VolumeMount, err error) {
	const hint = "write -v PATH:TARGET[:ro] or -v VOLUME:TARGET"
	parts := strings.Split(s, ":")
	readOnly := false
	if len(parts) == 3 {
		switch parts[2] {
		case "ro":
			readOnly = true
		case "rw":
		default:
			return nil, nil, usageError(s, hint, "%q is neither ro nor rw", parts[2])
		}
		parts = parts[:2]
	}
	if len(parts) != 2 || parts[0] == "" {
		return nil, nil, usageError(s, hint, "a mount has a source and a target")
	}
	source, target := parts[0], parts[1]
	if !filepath.IsAbs(target) || filepath.Clean(target) == "/" {
		return nil, nil, usageError(s, hint, "the target must be an absolute path and not /")
	}
	if !strings.Contains(source, "/") && source[0] != '.' && source[0] != '~' {
		if readOnly {
			return nil, nil, usageError(s, hint, "a volume cannot be mounted read-only")
		}
		return nil, &node.VolumeMount{Name: source, Path: target}, nil
	}
	if source, err = hostPath(source); err != nil {
		return nil, nil, err
	}
	if _, err := os.Stat(source); err != nil {
		return nil, nil, usageError(source, "create it first: a missing directory is not made, as that hides typing errors", "nothing to mount: %v", errors.Unwrap(err))
	}
	return &sandbox.Mount{Source: source, Target: filepath.Clean(target), ReadOnly: readOnly}, nil, nil
}

// hostPath makes a path on this host absolute and expands a leading "~/".
func hostPath(p string) (string, error) {
	if rest, ok := strings.CutPrefix(p, "~"); ok && (rest == "" || rest[0] == '/') {
		home, err := os.UserHomeDir()
		if err != nil {
			return "", err
		}
		p = home + rest
	}
	return filepath.Abs(p)
}

// addEnv puts "KEY=VALUE" into env, or with "KEY" this process's own value.
func addEnv(env map[string]string, s string) error {
	key, value, ok := strings.Cut(s, "=")
	if key == "" || strings.ContainsAny(key, " \t\x00") {
		return usageError(s, "write -e KEY=VALUE, or -e KEY to pass on your own value", "that is no name of a variable")
	}
	if !ok {
		if value, ok = os.LookupEnv(key); !ok {
			return nil // as docker: a variable that is not set is not passed on
		}
	}
	env[key] = value
	return nil
}

// maxEnvFile bounds an --env-file, in bytes.
const maxEnvFile = 1 << 20

// addEnvFile reads lines of "KEY=VALUE" or "KEY"; empty lines and lines that
// begin with # are left out.
func addEnvFile(env map[string]string, path string) error {
	f, err := os.Open(path)
	if err != nil {
		return usageError(path, "", "cannot read the --env-file: %v", errors.Unwrap(err))
	}
	defer f.Close()
	lines := bufio.NewScanner(io.LimitReader(f, maxEnvFile))
	lines.Buffer(nil, maxEnvFile)
	for n := 1; lines.Scan(); n++ {
		line := strings.TrimLeft(strings.TrimSuffix(lines.Text(), "\r"), " \t")
		if line == "" || line[0] == '#' {
			continue
		}
		if err := addEnv(env, line); err != nil {
			return usageError(fmt.Sprintf("%s:%d", path, n), "each line is KEY=VALUE, KEY or a # comment", "not a variable: %.40q", line)
		}
	}
	return lines.Err()
}

// sizeUnits are powers of 1024, as everywhere with memory and disks.
var sizeUnits = []struct {
	suffix string
	bytes  float64
}{{"t", 1 << 40}, {"g", 1 << 30}, {"m", 1 << 20}, {"k", 1 << 10}, {"", 1}}

// parseSize reads "512m", "1.5g", "2GiB", "100MB" or a number of bytes. A unit is
// a power of 1024.
func parseSize(s string) (int64, error) {
	number := strings.ToLower(strings.TrimSpace(s))
	number = strings.TrimSuffix(strings.TrimSuffix(number, "b"), "i")
	for _, u := range sizeUnits {
		n, ok := strings.CutSuffix(number, u.suffix)
		if !ok {
			continue
		}
		v, err := strconv.ParseFloat(strings.TrimSpace(n), 64)
		if err == nil && v <= 0 {
			return 0, usageError(s, "write more than 0, or leave it out for the default", "that is no size")
		}
		if err != nil || !(v*u.bytes < 1<<62) { // NaN fails too
			break
		}
		return int64(v * u.bytes), nil
	}
	return 0, usageError(s, "write a number and a unit, for example 512m or 1.5g", "that is no size")
}

// size is a flag's value in bytes.
type size int64

func (s *size) String() string {
	if *s == 0 {
		return ""
	}
	return formatBytes(int64(*s))
}
func (s *size) Type() string { return "size" }
func (s *size) Set(v string) error {
	n, err := parseSize(v)
	*s = size(n)
	return short(err)
}

// rules is a flag's value: how long things are kept, "last=3,age=30d,size=50G".
type rules chunk.Rules

func (r *rules) String() string {
	var parts []string
	if r.KeepLast > 0 {
		parts = append(parts, fmt.Sprintf("last=%d", r.KeepLast))
	}
	if r.MaxAge > 0 {
		parts = append(parts, "age="+r.MaxAge.String())
	}
	if r.MaxBytes > 0 {
		parts = append(parts, "size="+formatBytes(r.MaxBytes))
	}
	return strings.Join(parts, ",")
}
func (r *rules) Type() string { return "rules" }
func (r *rules) Set(v string) error {
	*r = rules{}
	for pair := range strings.SplitSeq(v, ",") {
		key, value, _ := strings.Cut(strings.TrimSpace(pair), "=")
		var err error
		switch key {
		case "last":
			r.KeepLast, err = strconv.Atoi(value)
		case "age":
			r.MaxAge, err = parseTTL(value)
		case "size":
			r.MaxBytes, err = parseSize(value)
		default:
			return fmt.Errorf("there is no rule %q: write last=NUMBER, age=DURATION or size=BYTES", key)
		}
		if err != nil || r.KeepLast < 0 || r.MaxAge < 0 || r.MaxBytes < 0 {
			return fmt.Errorf("%q makes no sense: write for example last=3,age=30d,size=50G", pair)
		}
	}
	if r.MaxAge == 0 && r.MaxBytes == 0 {
		return errors.New("nothing would ever go: add age=DURATION or size=BYTES")
	}
	return nil
}

// ttl is a flag's value: a duration that may also be in days, or plain seconds.
type ttl time.Duration

func (d *ttl) String() string {
	if *d == 0 {
		return ""
	}
	return time.Duration(*d).String()
}
func (d *ttl) Type() string { return "duration" }
func (d *ttl) Set(v string) error {
	n, err := parseTTL(v)
	*d = ttl(n)
	return short(err)
}

// parseTTL reads "90s", "10m", "1h30m", "2d", or a number of seconds.
func parseTTL(s string) (time.Duration, error) {
	d, err := time.ParseDuration(s)
	if days, ok := strings.CutSuffix(s, "d"); ok {
		var n float64
		n, err = strconv.ParseFloat(days, 64)
		d = time.Duration(n * 24 * float64(time.Hour))
	} else if seconds, serr := strconv.ParseFloat(s, 64); serr == nil {
		d, err = time.Duration(seconds*float64(time.Second)), nil
	}
	if err != nil || d < 0 {
		return 0, usageError(s, "write for example 90s, 10m, 1h30m or 2d", "that is no duration")
	}
	return d, nil
}

// short keeps of an error what fits behind pflag's own "invalid argument".
func short(err error) error {
	if err == nil {
		return nil
	}
	return errors.New(sandbox.HintOf(err))
}

// parsePairs reads KEY=VALUE pairs into a map; nil when there are none.
func parsePairs(flag string, pairs []string) (map[string]string, error) {
	if len(pairs) == 0 {
		return nil, nil
	}
	m := make(map[string]string, len(pairs))
	for _, p := range pairs {
		k, v, ok := strings.Cut(p, "=")
		if !ok || k == "" {
			return nil, usageError(p, "write --"+flag+" KEY=VALUE", "a %s has a key and a value", flag)
		}
		m[k] = v
	}
	return m, nil
}

// parseCommand drops the "--" between an argument and the command after it.
func parseCommand(args []string) []string {
	if len(args) > 0 && args[0] == "--" {
		return args[1:]
	}
	return args
}
