package image

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"slices"
	"strings"
	"syscall"

	"github.com/atoll-run/atoll/sandbox"
)

// aptOptions returns the host's settings for fetching packages, as lines of
// apt.conf.
func aptOptions(ctx context.Context) []string {
	// Packages are fetched as the user that we are: the directory is closed to others.
	options := []string{`APT::Sandbox::User "root"`, `Acquire::Languages "none"`, `Acquire::Retries "3"`}
	out, err := exec.CommandContext(ctx, "apt-config", "dump").Output()
	if err != nil {
		return options
	}
	for line := range strings.Lines(string(out)) {
		line = strings.TrimSuffix(strings.TrimSpace(line), ";")
		lower := strings.ToLower(line)
		if strings.HasPrefix(lower, "acquire::http") || strings.HasPrefix(lower, "acquire::ftp") || strings.HasPrefix(lower, "acquire::check-") {
			options = append(options, line)
		}
	}
	for key, path := range map[string]string{"Dir::Etc::netrc": "/etc/apt/auth.conf", "Dir::Etc::netrcparts": "/etc/apt/auth.conf.d"} {
		if _, err := os.Stat(path); err == nil {
			options = append(options, fmt.Sprintf("%s %q", key, path))
		}
	}
	slices.Sort(options[3:])
	return options
}

// aptSources returns the host's own sources for a suite as lines of
// sources.list; empty when it has none, which leaves the choice to mmdebstrap.
func aptSources(ctx context.Context, host distribution, suite string) string {
	out, err := exec.CommandContext(ctx, "apt-get", "indextargets", "--format", "$(SITE) $(RELEASE) $(COMPONENT)", "Created-By: Packages").Output()
	if err != nil {
		return ""
	}
	return sourceLines(string(out), host.codename, suite)
}

// sourceLines turns "site release component" lines into sources, taking those
// of the host's release and writing them for suite. Other releases of one
// distribution are on the same mirrors, other vendors' repositories are not wanted.
func sourceLines(targets, codename, suite string) string {
	var lines []string
	for line := range strings.Lines(targets) {
		f := strings.Fields(line)
		if len(f) != 3 {
			continue
		}
		pocket, ok := strings.CutPrefix(f[1], codename)
		if !ok || pocket != "" && pocket != "-updates" && pocket != "-security" {
			continue
		}
		source := fmt.Sprintf("deb %s %s%s %s", f[0], suite, pocket, f[2])
		if !slices.Contains(lines, source) {
			lines = append(lines, source)
		}
	}
	return strings.Join(lines, "\n")
}

// mmdebstrapLog follows what mmdebstrap says and keeps the end of it, to explain
// a failure.
type mmdebstrapLog struct {
	report func(stage string)
	line   bytes.Buffer
	errors []string
}

// maxLogLine bounds a line of the log, maxLogErrors the lines kept.
const (
	maxLogLine   = 4 << 10
	maxLogErrors = 8
)

func (l *mmdebstrapLog) Write(p []byte) (int, error) {
	for _, c := range p {
		if c != '\n' && c != '\r' {
			if l.line.Len() < maxLogLine {
				l.line.WriteByte(c)
			}
			continue
		}
		l.add(strings.TrimSpace(l.line.String()))
		l.line.Reset()
	}
	return len(p), nil
}

func (l *mmdebstrapLog) add(line string) {
	if text, ok := strings.CutPrefix(line, "I: "); ok {
		if stage, ok := strings.CutSuffix(text, "..."); ok {
			l.report(stage)
		}
		return
	}
	if strings.HasPrefix(line, "E: ") || strings.HasPrefix(line, "Err:") || strings.Contains(line, "rror") {
		if len(l.errors) < maxLogErrors {
			l.errors = append(l.errors, line)
		}
	}
}

// explain turns what was said into an error of the right kind.
func (l *mmdebstrapLog) explain(err error) error {
	text := strings.Join(l.errors, "; ")
	if text == "" {
		text = err.Error()
	}
	e := sandbox.E("mmdebstrap", sandbox.Internal, "", errors.New(text))
	switch {
	case strings.Contains(text, "No space left"):
		return sandbox.E("mmdebstrap", sandbox.Exhausted, "", syscall.ENOSPC)
	case strings.Contains(text, "Unable to locate package"), strings.Contains(text, "has no installation candidate"):
		e.Kind = sandbox.NotFound
		return e.WithHint("'apt-cache search' finds the names of packages")
	case strings.Contains(text, "does not have a Release file"):
		e.Kind = sandbox.NotFound
		return e.WithHint("the mirror in /etc/apt does not have this suite")
	case strings.Contains(text, "resolve"), strings.Contains(text, "connect"), strings.Contains(text, "Failed to fetch"), strings.Contains(text, "timed out"):
		e.Kind = sandbox.Unavailable
		return e.WithHint("the package mirror in /etc/apt does not answer: check the network and apt's proxy settings")
	}
	return e
}
