package main

import (
	"fmt"
	"net"
	"runtime"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/spf13/cobra"

	"github.com/atoll-run/atoll/api/native"
	"github.com/atoll-run/atoll/node"
	"github.com/atoll-run/atoll/sandbox"
	"github.com/atoll-run/atoll/tenant"
)

// version is set by the linker.
var version = "dev"

func versionCommand() *cobra.Command {
	var f format
	cmd := &cobra.Command{
		Use: "version", Short: "Print the version", Args: exact(),
		RunE: func(cmd *cobra.Command, _ []string) error {
			v := struct {
				Version string `json:"version"`
				Go      string `json:"go"`
				OS      string `json:"os"`
				Arch    string `json:"arch"`
			}{version, runtime.Version(), runtime.GOOS, runtime.GOARCH}
			if done, err := f.structured(cmd.OutOrStdout(), v); done {
				return err
			}
			_, err := fmt.Fprintf(cmd.OutOrStdout(), "atoll %s (%s, %s/%s)\n", v.Version, v.Go, v.OS, v.Arch)
			return err
		},
	}
	f.flags(cmd, "")
	return cmd
}

func (a *app) infoCommand() *cobra.Command {
	var f format
	cmd := &cobra.Command{
		Use: "info", Aliases: []string{"node"}, Short: "Show what this node is and has", Args: exact(),
		RunE: func(cmd *cobra.Command, _ []string) error {
			if err := f.check(); err != nil {
				return err
			}
			b, err := a.open(cmd.Context())
			if err != nil {
				return err
			}
			info, err := b.Info(cmd.Context())
			if err != nil {
				return err
			}
			runtimes, err := b.Runtimes(cmd.Context())
			if err != nil {
				return err
			}
			all := struct {
				node.Info
				Daemon   string             `json:"daemon,omitempty"` // its URL; empty without one
				Runtimes []node.RuntimeInfo `json:"runtimes"`
			}{info, a.daemonURL, runtimes}
			if done, err := f.structured(a.stdout, all); done {
				return err
			}
			t := newTable(a.stdout)
			t.row("Version", info.Version)
			t.row("Daemon", first(a.daemonURL, "none: this command made a node for itself"))
			t.row("State", info.Dir)
			t.row("CPUs", strconv.Itoa(info.CPUs))
			t.row("Sandboxes", strconv.Itoa(info.Sandboxes))
			var names []string
			for _, r := range runtimes {
				if r.Err == "" {
					names = append(names, r.Name)
				}
			}
			t.row("Runtimes", strings.Join(names, ", "))
			if info.NetworkError != "" {
				t.row("Network", "none: "+info.NetworkError)
			}
			return t.flush()
		},
	}
	f.flags(cmd, "")
	return cmd
}

func (a *app) runtimeCommand() *cobra.Command {
	yes := func(b bool) string {
		if b {
			return "yes"
		}
		return "no"
	}
	ls := listVerb(a, a.open, "List the runtimes and what each can do", "print names only", native.Backend.Runtimes, func(r node.RuntimeInfo) string { return r.Name }, func(time.Time) []column[node.RuntimeInfo] {
		return []column[node.RuntimeInfo]{
			{head: "NAME", cell: func(r node.RuntimeInfo) string { return r.Name }},
			{head: "DEFAULT", cell: func(r node.RuntimeInfo) string { return yes(r.Default) }},
			{head: "ISOLATION", cell: func(r node.RuntimeInfo) string { return string(r.Capabilities.Isolation) }},
			{head: "SNAPSHOT", cell: func(r node.RuntimeInfo) string {
				switch {
				case r.Capabilities.Snapshot && r.Capabilities.Memory:
					return "memory and files"
				case r.Capabilities.Snapshot:
					return "files"
				}
				return "no"
			}},
			{head: "ROOTS", wide: true, cell: func(r node.RuntimeInfo) string { return strings.Trim(fmt.Sprint(r.Capabilities.Roots), "[]") }},
			{head: "NETWORKS", wide: true, cell: func(r node.RuntimeInfo) string { return strings.Trim(fmt.Sprint(r.Capabilities.Networks), "[]") }},
			{head: "LIMITS", wide: true, cell: limits},
			{head: "USABLE", cell: func(r node.RuntimeInfo) string { return first(r.Err, "yes") }},
		}
	})
	return group("runtime", "Show the runtimes", ls)
}

func limits(r node.RuntimeInfo) string {
	var words []string
	for _, l := range []struct {
		has  bool
		name string
	}{{r.Capabilities.CPULimit, "cpu"}, {r.Capabilities.MemLimit, "memory"}, {r.Capabilities.DiskLimit, "disk"}, {r.Capabilities.PidsLimit, "pids"}} {
		if l.has {
			words = append(words, l.name)
		}
	}
	return strings.Join(words, " ")
}

func (a *app) keyCommand() *cobra.Command {
	return group("key", "Manage who may ask: API keys", a.keyCreateCommand(), a.keyListCommand(), a.keyRevokeCommand())
}

func (a *app) keyCreateCommand() *cobra.Command {
	var f format
	var team, name string
	cmd := &cobra.Command{
		Use: "create", Short: "Make a key, as E2B's SDK accepts it", Args: exact(),
		Example: "  export E2B_API_KEY=$(atoll key create -q)",
		RunE: func(cmd *cobra.Command, _ []string) error {
			if err := f.check(); err != nil {
				return err
			}
			b, err := a.openDaemon(cmd.Context())
			if err != nil {
				return err
			}
			key, err := b.CreateKey(cmd.Context(), team, name)
			if err != nil {
				return err
			}
			if done, err := f.structured(a.stdout, key); done {
				return err
			}
			fmt.Fprintln(a.stdout, key.Secret)
			if !f.quiet && a.interactive {
				fmt.Fprintln(a.stderr, "Keep it, it is shown this once. For E2B's SDK:  export E2B_API_KEY="+key.Secret+" E2B_API_URL="+a.daemonURL+" E2B_SANDBOX_URL="+a.daemonURL)
			}
			return nil
		},
	}
	f.flags(cmd, "print the key only")
	cmd.Flags().StringVar(&team, "team", "", "the `team` whose sandboxes it sees")
	cmd.Flags().StringVar(&name, "name", "", "a `name` to remember it by")
	return cmd
}

func (a *app) keyListCommand() *cobra.Command {
	return listVerb(a, a.openDaemon, "List keys, without their secrets", "print IDs only", native.Backend.Keys, func(k tenant.Key) string { return k.ID }, func(now time.Time) []column[tenant.Key] {
		return []column[tenant.Key]{
			{head: "ID", cell: func(k tenant.Key) string { return shortID(k.ID) }},
			{head: "NAME", cell: func(k tenant.Key) string { return k.Name }},
			{head: "TEAM", cell: func(k tenant.Key) string { return k.Team }},
			{head: "KEY", cell: func(k tenant.Key) string { return k.Hint + "..." }},
			{head: "AGE", cell: func(k tenant.Key) string { return formatAge(now.Sub(k.Created)) }},
		}
	})
}

func (a *app) keyRevokeCommand() *cobra.Command {
	return &cobra.Command{
		Use: "revoke KEY...", Aliases: []string{"rm"}, Short: "Revoke keys by ID or name", Args: atLeast("a key"),
		RunE: func(cmd *cobra.Command, refs []string) error {
			return a.each(cmd, refs, func(b native.Backend, ref string) error { return b.RevokeKey(cmd.Context(), ref) })
		},
	}
}

func (a *app) poolCommand() *cobra.Command {
	ls := listVerb(a, a.openDaemon, "List the pools", "print templates only", native.Backend.Pools, func(p node.Pool) string { return p.Template }, func(time.Time) []column[node.Pool] {
		return []column[node.Pool]{
			{head: "TEMPLATE", cell: func(p node.Pool) string { return p.Template }},
			{head: "RUNTIME", cell: func(p node.Pool) string { return p.Runtime }},
			{head: "SIZE", cell: func(p node.Pool) string { return strconv.Itoa(p.Size) }},
			{head: "READY", cell: func(p node.Pool) string { return strconv.Itoa(p.Ready) }},
		}
	})
	set := &cobra.Command{
		Use: "set TEMPLATE SIZE", Short: "Keep this many sandboxes of a template ready; 0 ends the pool", Args: exact("a template", "a size"),
		RunE: func(cmd *cobra.Command, args []string) error {
			size, err := strconv.Atoi(args[1])
			if err != nil {
				return usageError(args[1], "write a number, for example `atoll pool set base 4`", "that is no size")
			}
			b, err := a.openDaemon(cmd.Context())
			if err != nil {
				return err
			}
			return b.SetPool(cmd.Context(), args[0], size)
		},
	}
	a.completes(set, 1, templateNames)
	return group("pool", "Keep started sandboxes ready", ls, set)
}

func (a *app) portCommand() *cobra.Command {
	var f format
	var forward bool
	var remove []int
	cmd := &cobra.Command{
		Use: "port SANDBOX [[ADDRESS:]HOST:]GUEST...", Short: "List a sandbox's ports, open more, or forward them", Args: atLeast("a sandbox"),
		Long: "Without ports: list those that are published. With ports: publish them on the node until the sandbox ends.\n" +
			"With --forward the ports are opened on the machine where this command runs, for as long as it runs.",
		Example: "  atoll port web 8080:80\n  atoll port web --forward 3000",
		RunE: func(cmd *cobra.Command, args []string) error {
			if err := f.check(); err != nil {
				return err
			}
			b, sb, err := a.get(cmd.Context(), args[0])
			if err != nil {
				return err
			}
			var ports []node.Port
			for _, s := range args[1:] {
				p, err := parsePort(s)
				if err != nil {
					return err
				}
				ports = append(ports, p)
			}
			for _, guest := range remove {
				if err := b.Unexpose(cmd.Context(), sb.ID, guest); err != nil {
					return err
				}
			}
			switch {
			case forward && len(ports) == 0:
				return usageError("", "usage: "+cmd.UseLine(), "--forward needs a port")
			case forward:
				return a.forward(cmd, b, sb.ID, ports)
			case len(ports) == 0:
				ports = sb.Ports
			default:
				for i, p := range ports {
					if ports[i], err = b.Expose(cmd.Context(), sb.ID, p); err != nil {
						return err
					}
				}
			}
			if len(remove) > 0 && len(args) == 1 {
				return nil
			}
			return list(a.stdout, &f, ports, func(p node.Port) string { return net.JoinHostPort(p.HostIP, strconv.Itoa(p.Host)) }, []column[node.Port]{
				{head: "GUEST", cell: func(p node.Port) string { return strconv.Itoa(p.Guest) }},
				{head: "HOST", cell: func(p node.Port) string { return net.JoinHostPort(p.HostIP, strconv.Itoa(p.Host)) }},
			})
		},
	}
	f.flags(cmd, "print host addresses only")
	cmd.Flags().BoolVar(&forward, "forward", false, "open the ports here, until ctrl-c")
	cmd.Flags().IntSliceVar(&remove, "rm", nil, "close the published port of this `number` inside")
	a.completes(cmd, 1, sandboxNames(sandbox.Running))
	return cmd
}

// maxForwarded bounds the connections that one forwarded port carries at once.
const maxForwarded = 256

// forward listens on this machine and carries every connection into the sandbox.
func (a *app) forward(cmd *cobra.Command, b native.Backend, id string, ports []node.Port) error {
	ctx := cmd.Context()
	var listening sync.WaitGroup
	defer listening.Wait()
	for _, p := range ports {
		if p.Host == 0 {
			p.Host = p.Guest
		}
		l, err := net.Listen("tcp", net.JoinHostPort(first(p.HostIP, "127.0.0.1"), strconv.Itoa(p.Host)))
		if err != nil {
			return sandbox.E("atoll port", sandbox.Conflict, strconv.Itoa(p.Host), err).WithHint("choose another port: --forward 8081:" + strconv.Itoa(p.Guest))
		}
		defer l.Close()
		fmt.Fprintf(a.stdout, "%s > %d\n", l.Addr(), p.Guest)
		listening.Go(func() {
			slots := make(chan struct{}, maxForwarded)
			for {
				outside, err := l.Accept()
				if err != nil {
					return // closed
				}
				slots <- struct{}{}
				go func() {
					defer func() { <-slots }()
					inside, err := b.Dial(ctx, id, p.Guest)
					if err != nil {
						fmt.Fprintln(a.stderr, "atoll:", native.ProblemOf(err).Detail)
						outside.Close()
						return
					}
					node.Splice(outside, inside)
				}()
			}
		})
	}
	<-ctx.Done()
	return nil
}
