package main

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/spf13/cobra"
	"golang.org/x/term"

	"github.com/atoll-run/atoll/api/native"
	"github.com/atoll-run/atoll/node"
	"github.com/atoll-run/atoll/sandbox"
)

// usage is one sandbox's row in stats and top.
type usage struct {
	ID   string `json:"id"`
	Name string `json:"name"`
	sandbox.Stats
	Percent float64 `json:"cpuPercent"` // of one core, since the sample before; 0 without one
}

// maxSampling bounds how many sandboxes are asked at once.
const maxSampling = 16

// sample reads what the sandboxes use now. One that went away meanwhile is left
// out. before holds the rows of the sample before, by ID.
func sample(ctx context.Context, b native.Backend, refs []string, before map[string]usage) ([]usage, error) {
	all, err := b.List(ctx, node.Filter{States: []sandbox.State{sandbox.Running, sandbox.Paused}})
	if err != nil {
		return nil, err
	}
	rows := make([]usage, len(all))
	slots := make(chan struct{}, maxSampling)
	var reading sync.WaitGroup
	for i, sb := range all {
		if sb.Suspended != "" || len(refs) > 0 && !slices.ContainsFunc(refs, func(ref string) bool { return sb.Name == ref || strings.HasPrefix(sb.ID, ref) }) {
			continue
		}
		slots <- struct{}{}
		reading.Go(func() {
			defer func() { <-slots }()
			s, err := b.Stats(ctx, sb.ID)
			if err != nil {
				return
			}
			row := usage{ID: sb.ID, Name: sb.Name, Stats: s}
			if old, ok := before[sb.ID]; ok && s.Time.After(old.Time) {
				row.Percent = 100 * (s.CPU - old.CPU).Seconds() / s.Time.Sub(old.Time).Seconds()
			}
			rows[i] = row
		})
	}
	reading.Wait()
	return slices.DeleteFunc(rows, func(u usage) bool { return u.ID == "" }), ctx.Err()
}

func usageColumns(percent bool) []column[usage] {
	cpu := column[usage]{head: "CPU TIME", cell: func(u usage) string { return u.CPU.Round(10 * time.Millisecond).String() }}
	if percent {
		cpu = column[usage]{head: "CPU", cell: func(u usage) string { return fmt.Sprintf("%.1f%%", max(0, u.Percent)) }}
	}
	of := func(used, limit int64) string {
		if limit == 0 {
			return formatBytes(used)
		}
		return formatBytes(used) + " / " + formatBytes(limit)
	}
	return []column[usage]{
		{head: "NAME", cell: func(u usage) string { return u.Name }},
		{head: "ID", cell: func(u usage) string { return shortID(u.ID) }},
		cpu,
		{head: "MEMORY", cell: func(u usage) string { return of(u.Memory, u.MemoryLimit) }},
		{head: "DISK", cell: func(u usage) string { return of(u.Disk, u.DiskLimit) }},
		{head: "PIDS", cell: func(u usage) string { return strconv.Itoa(u.Pids) }},
		{head: "RECEIVED", cell: func(u usage) string { return formatBytes(u.RxBytes) }},
		{head: "SENT", cell: func(u usage) string { return formatBytes(u.TxBytes) }},
	}
}

func (a *app) statsCommand() *cobra.Command {
	var f format
	cmd := &cobra.Command{
		Use: "stats [SANDBOX...]", Short: "Show once what sandboxes use",
		RunE: func(cmd *cobra.Command, refs []string) error {
			if err := f.check(); err != nil {
				return err
			}
			b, err := a.openDaemon(cmd.Context())
			if err != nil {
				return err
			}
			for _, ref := range refs { // an unknown one is an error, not an empty table
				if _, err := b.Get(cmd.Context(), ref); err != nil {
					return a.suggest(cmd.Context(), b, ref, err)
				}
			}
			rows, err := sample(cmd.Context(), b, refs, nil)
			if err != nil {
				return err
			}
			return list(a.stdout, &f, rows, func(u usage) string { return u.ID }, usageColumns(false))
		},
	}
	f.flags(cmd, "")
	a.completes(cmd, -1, sandboxNames(sandbox.Running))
	return cmd
}

func (a *app) topCommand() *cobra.Command {
	var interval ttl
	cmd := &cobra.Command{
		Use: "top [SANDBOX...]", Short: "Show what sandboxes use, again and again; q ends it",
		RunE: func(cmd *cobra.Command, refs []string) error {
			b, err := a.openDaemon(cmd.Context())
			if err != nil {
				return err
			}
			every := max(time.Duration(interval), 200*time.Millisecond)
			return a.watchTop(cmd.Context(), b, refs, every)
		},
	}
	interval = ttl(2 * time.Second)
	cmd.Flags().Var(&interval, "interval", "how often to look")
	a.completes(cmd, -1, sandboxNames(sandbox.Running))
	return cmd
}

// watchTop redraws the table until q, ctrl-c or the end of ctx. Without a
// terminal it prints two samples' difference once.
func (a *app) watchTop(ctx context.Context, b native.Backend, refs []string, every time.Duration) error {
	out, screen := isTerminal(a.stdout)
	keys := make(chan byte, 1)
	if in, ok := isTerminal(a.stdin); ok && screen {
		restore, err := term.MakeRaw(int(in.Fd()))
		if err != nil {
			return err
		}
		defer func() { _ = term.Restore(int(in.Fd()), restore) }()
		fmt.Fprint(a.stdout, "\x1b[?1049h\x1b[?25l")
		defer fmt.Fprint(a.stdout, "\x1b[?25h\x1b[?1049l")
		go func() { // ends with the process
			for key := [1]byte{}; ; {
				if n, err := in.Read(key[:]); n == 0 || err != nil {
					return
				}
				keys <- key[0]
			}
		}()
	}
	before := map[string]usage{}
	for drawn := 0; ; drawn++ {
		rows, err := sample(ctx, b, refs, before)
		if err != nil {
			return err
		}
		slices.SortStableFunc(rows, func(x, y usage) int { return int(y.Percent*100) - int(x.Percent*100) })
		if screen {
			width, height, _ := term.GetSize(int(out.Fd()))
			fmt.Fprint(a.stdout, screenOf(rows, width, height, time.Now()))
		} else if drawn > 0 {
			return list(a.stdout, &format{}, rows, nil, usageColumns(true))
		}
		clear(before)
		for _, r := range rows {
			before[r.ID] = r
		}
		pause := every
		if drawn == 0 {
			pause = min(every, 500*time.Millisecond) // percentages need a second sample soon
		}
		select {
		case <-ctx.Done():
			return nil
		case key := <-keys:
			if key == 'q' || key == 3 { // ctrl-c in raw mode
				return nil
			}
		case <-time.After(pause):
		}
	}
}

// screenOf draws a whole screen of width by height characters from the top left.
func screenOf(rows []usage, width, height int, now time.Time) string {
	var memory int64
	var cpu float64
	for _, r := range rows {
		memory += r.Memory
		cpu += r.Percent
	}
	var table strings.Builder
	_ = list(&table, &format{}, rows, nil, usageColumns(true)) // a Builder does not fail
	lines := []string{fmt.Sprintf("%s   %d sandboxes   CPU %.1f%%   memory %s   q ends", now.Format("15:04:05"), len(rows), cpu, formatBytes(memory)), ""}
	lines = append(lines, strings.Split(strings.TrimSuffix(table.String(), "\n"), "\n")...)
	var b strings.Builder
	b.WriteString("\x1b[H")
	for i, line := range lines {
		if i == height-1 && i < len(lines)-1 {
			line = fmt.Sprintf("... and %d more", len(lines)-i)
		}
		if runes := []rune(line); width > 0 && len(runes) > width {
			line = string(runes[:width])
		}
		if i == 2 {
			line = "\x1b[7m" + line + strings.Repeat(" ", max(0, width-len([]rune(line)))) + "\x1b[0m"
		}
		b.WriteString(line + "\x1b[K")
		if i == height-1 {
			break
		}
		b.WriteString("\r\n")
	}
	b.WriteString("\x1b[J")
	return b.String()
}

func (a *app) eventsCommand() *cobra.Command {
	var f format
	var since uint64
	var all bool
	cmd := &cobra.Command{
		Use: "events", Short: "Follow what happens to sandboxes", Args: exact(),
		RunE: func(cmd *cobra.Command, _ []string) error {
			if err := f.check(); err != nil {
				return err
			}
			b, err := a.openDaemon(cmd.Context())
			if err != nil {
				return err
			}
			if !all && !cmd.Flags().Changed("since") {
				info, err := b.Info(cmd.Context())
				if err != nil {
					return err
				}
				since = info.LastEvent
			}
			events, err := b.Events(cmd.Context(), since)
			if err != nil {
				return err
			}
			for e := range events {
				if err := printEvent(a.stdout, &f, e); err != nil {
					return err
				}
			}
			if cmd.Context().Err() != nil {
				return nil // ctrl-c is how one ends it
			}
			return sandbox.Errorf("atoll events", sandbox.Unavailable, "", "the daemon hung up")
		},
	}
	f.flags(cmd, "")
	cmd.Flags().Uint64Var(&since, "since", 0, "those too that came after event `number`")
	cmd.Flags().BoolVarP(&all, "all", "a", false, "those too that are still remembered")
	return cmd
}

// printEvent prints one event as a line; JSON too is one line an event.
func printEvent(w io.Writer, f *format, e sandbox.Event) error {
	switch f.form {
	case "json":
		return json.NewEncoder(w).Encode(e)
	case "yaml":
		fmt.Fprintln(w, "---")
		_, err := f.structured(w, e)
		return err
	}
	what := string(e.Kind)
	if e.Kind == sandbox.EventState {
		what = string(e.State)
	}
	_, err := fmt.Fprintln(w, strings.TrimSpace(fmt.Sprintf("%s %6d  %s  %-11s %s", e.Time.Local().Format("2006-01-02 15:04:05.000"), e.Seq, shortID(e.Sandbox), what, printable(e.Reason))))
	return err
}
