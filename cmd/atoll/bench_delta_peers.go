package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"
)

// A deltaPeer is a program that makes deltas too.
type deltaPeer struct {
	name string
	args func(d *deltaBench) []string
	// size returns the bytes that it made or sent, given what it printed.
	size func(d *deltaBench, printed string) (int64, error)
}

// deltaPeers are run as their users would. rsync works on a copy of the old file, as if that were at the other end.
var deltaPeers = []deltaPeer{
	{"rsync -z", func(d *deltaBench) []string {
		return []string{"rsync", "-z", "--inplace", "--no-whole-file", "--stats", d.newName, d.peerFile()}
	}, func(_ *deltaBench, printed string) (int64, error) { return rsyncTotal(printed) }},
	{"zstd --patch-from", func(d *deltaBench) []string {
		return []string{"zstd", "-3", "--long=31", "-q", "-f", "--patch-from=" + d.oldName, d.newName, "-o", d.peerFile()}
	}, fileSize},
	{"xdelta3", func(d *deltaBench) []string {
		return []string{"xdelta3", "-e", "-f", "-B", strconv.FormatInt(min(d.old.Size+1, 2<<30-1), 10), "-s", d.oldName, d.newName, d.peerFile()}
	}, fileSize},
}

func (d *deltaBench) peerFile() string { return filepath.Join(d.dir, "peer") }

func fileSize(d *deltaBench, _ string) (int64, error) {
	info, err := os.Stat(d.peerFile())
	if err != nil {
		return 0, err
	}
	return info.Size(), nil
}

// run measures the program, or says why not.
func (p deltaPeer) run(ctx context.Context, d *deltaBench) (b besides, err error) {
	b.Name = p.name
	args := p.args(d)
	if _, err := exec.LookPath(args[0]); err != nil {
		b.Absent = args[0] + " is not installed"
		return b, nil
	}
	if args[0] == "rsync" {
		if err := copyRegular(ctx, d.oldName, d.peerFile()); err != nil {
			return b, err
		}
	}
	defer func() {
		if e := os.Remove(d.peerFile()); !errors.Is(e, os.ErrNotExist) {
			err = errors.Join(err, e)
		}
	}()
	before := processorTime(unix.RUSAGE_CHILDREN)
	cmd := exec.CommandContext(ctx, args[0], args[1:]...)
	cmd.Env = append(os.Environ(), "LC_ALL=C")
	printed, err := cmd.CombinedOutput()
	if err != nil {
		if ctx.Err() != nil {
			return b, ctx.Err()
		}
		line, _, _ := strings.Cut(strings.TrimSpace(string(printed)), "\n")
		b.Absent = fmt.Sprintf("%v: %s", err, line)
		return b, nil
	}
	b.CPU = round(processorTime(unix.RUSAGE_CHILDREN) - before)
	b.Bytes, err = p.size(d, string(printed))
	return b, err
}

// copyRegular copies a file, sparse where it is zero.
func copyRegular(ctx context.Context, from, to string) error {
	if printed, err := exec.CommandContext(ctx, "cp", "--sparse=always", "--", from, to).CombinedOutput(); err != nil {
		return fmt.Errorf("copying %s: %w: %s", from, err, printed)
	}
	return nil
}

var rsyncTotals = regexp.MustCompile(`(?m)^Total bytes (?:sent|received): ([0-9,]+)$`)

// rsyncTotal adds the bytes of both directions.
func rsyncTotal(printed string) (total int64, err error) {
	found := rsyncTotals.FindAllStringSubmatch(printed, -1)
	if len(found) != 2 {
		return 0, fmt.Errorf("rsync printed no totals: %s", printed)
	}
	for _, m := range found {
		n, err := strconv.ParseInt(strings.ReplaceAll(m[1], ",", ""), 10, 64)
		if err != nil {
			return 0, err
		}
		total += n
	}
	return total, nil
}
