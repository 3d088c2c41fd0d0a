package main

import (
	"fmt"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"github.com/atoll-run/atoll/node"
	"github.com/atoll-run/atoll/sandbox"
)

// createOptions are the flags of everything that makes a sandbox.
type createOptions struct {
	name, runtimes, network, user, workdir, hostname, onTimeout string

	cpus                  float64
	memory, disk, rate    size
	pids                  int
	ttl, idle             ttl
	env, envFiles         []string
	volumes, ports        []string
	allow, deny           []string
	labels, metadata      []string
	fresh, secure, remove bool
	noInternet            bool
	boot                  bootOptions
	autoResume, restart   bool
}

// flags registers what create and run have in common.
func (o *createOptions) flags(cmd *cobra.Command) {
	fl := cmd.Flags()
	fl.StringVar(&o.name, "name", "", "the sandbox's `name`; default: one is made up")
	fl.StringVar(&o.runtimes, "runtime", "", "the runtime, or several in order of preference: `gvisor,microvm`")
	fl.Float64Var(&o.cpus, "cpus", 0, "how many `cores` it may use, for example 0.5")
	fl.VarP(&o.memory, "memory", "m", "how much memory it may use, for example 512m")
	fl.Var(&o.disk, "disk", "how much it may write to its root, for example 2g")
	fl.IntVar(&o.pids, "pids", 0, "how many `processes` and threads it may have")
	fl.StringVar(&o.network, "network", "", "`none`, sandbox (an address of its own) or host")
	fl.BoolVar(&o.noInternet, "no-internet", false, "reach nothing but what --allow names")
	fl.StringArrayVarP(&o.volumes, "volume", "v", nil, "mount `SOURCE:TARGET[:ro]`")
	fl.StringArrayVarP(&o.ports, "publish", "p", nil, "make a port reachable on this host: `[[ADDRESS:]HOST:]GUEST`")
	fl.StringVarP(&o.user, "user", "u", "", "who commands run as")
	fl.StringVarP(&o.workdir, "workdir", "w", "", "the `directory` in which commands start")
	fl.StringVar(&o.hostname, "hostname", "", "the `name` it calls itself")
	fl.StringArrayVar(&o.labels, "label", nil, "a `KEY=VALUE` for the runtime, for example worktree.branch=fix")
	fl.BoolVar(&o.fresh, "fresh", false, "boot anew even where a snapshot or a pool would be faster")
	fl.BoolVar(&o.secure, "secure", false, "give it a token without which it answers nobody")
	fl.BoolVar(&o.restart, "restart", false, "make it anew when it is lost, as when its kernel crashes")
	o.boot.flags(cmd)
	o.childFlags(cmd)
	_ = cmd.RegisterFlagCompletionFunc("network", cobra.FixedCompletions([]string{"none", "sandbox", "host"}, cobra.ShellCompDirectiveNoFileComp))
}

// childFlags registers what may differ between a sandbox and its children.
func (o *createOptions) childFlags(cmd *cobra.Command) {
	fl := cmd.Flags()
	fl.StringArrayVarP(&o.env, "env", "e", nil, "set a variable: `KEY=VALUE`, or KEY for this shell's value")
	fl.StringArrayVar(&o.envFiles, "env-file", nil, "set the variables in a `file`")
	fl.StringArrayVar(&o.metadata, "metadata", nil, "remember a `KEY=VALUE`, see `atoll ls --metadata`")
	fl.StringArrayVar(&o.allow, "allow", nil, "let it reach a `CIDR`, address, domain or *.domain")
	fl.StringArrayVar(&o.deny, "deny", nil, "keep it from reaching a `CIDR` or address")
	fl.Var(&o.rate, "rate", "how many bytes a second it may send, and as many receive, for example 10m")
	fl.Var(&o.ttl, "ttl", "how long it may live, for example 10m")
	fl.Var(&o.idle, "idle", "after how long without use it is paused until the next use, for example 15m")
	fl.StringVar(&o.onTimeout, "on-timeout", "", "what happens then: `kill`, pause, or pause-files")
	fl.BoolVar(&o.autoResume, "auto-resume", false, "traffic resumes it when it is paused")
}

// request is what the flags ask for.
func (o *createOptions) request(image string) (node.CreateRequest, error) {
	req := node.CreateRequest{
		Image: image, Name: o.name, Network: sandbox.NetworkMode(o.network), User: o.user, Workdir: o.workdir, Hostname: o.hostname,
		Resources: sandbox.Resources{CPUs: o.cpus, Memory: int64(o.memory), Disk: int64(o.disk), Pids: o.pids},
		Timeout:   time.Duration(o.ttl), Fresh: o.fresh, Secure: o.secure,
		Lifecycle: node.Lifecycle{OnTimeout: node.TimeoutAction(o.onTimeout), AutoResume: o.autoResume, Idle: time.Duration(o.idle), Remove: o.remove, Restart: o.restart},
	}
	if o.runtimes != "" {
		req.Runtimes = strings.Split(o.runtimes, ",")
	}
	if image != "" && (image[0] == '.' || image[0] == '~' || strings.HasPrefix(image, "/")) {
		var err error
		if req.Image, err = hostPath(image); err != nil { // a repository; the node has another working directory
			return req, err
		}
	}
	if err := o.check(); err != nil {
		return req, err
	}
	if err := o.fill(&req); err != nil {
		return req, err
	}
	var err error
	if req.Boot, err = o.boot.request(); err != nil {
		return req, err
	}
	if len(o.allow)+len(o.deny) > 0 || o.noInternet || o.rate > 0 {
		req.Policy = &sandbox.NetworkPolicy{Internet: !o.noInternet, AllowOut: o.allow, DenyOut: o.deny, RateLimit: int64(o.rate)}
	}
	return req, nil
}

// maxCPUs is more cores than any machine has.
const maxCPUs = 1e5

func (o *createOptions) check() error {
	switch sandbox.NetworkMode(o.network) {
	case "", sandbox.NetworkNone, sandbox.NetworkSandbox, sandbox.NetworkHost:
	default:
		return usageError(o.network, "use --network none, sandbox or host", "there is no such network mode")
	}
	if o.rate > 0 && o.network != "" && o.network != string(sandbox.NetworkSandbox) {
		return usageError("--network "+o.network, "leave it out, or --rate", "only a network of the sandbox's own has a rate")
	}
	switch node.TimeoutAction(o.onTimeout) {
	case "", node.TimeoutKill, node.TimeoutPause, node.TimeoutShelve:
	default:
		return usageError(o.onTimeout, "use --on-timeout kill, pause or pause-files", "there is no such action")
	}
	if !(o.cpus >= 0 && o.cpus < maxCPUs) { // NaN fails too
		return usageError(fmt.Sprint("--cpus ", o.cpus), "write for example 0.5 or 2, or leave it out for the default", "that is no number of cores")
	}
	if o.pids < 0 {
		return usageError(fmt.Sprint("--pids ", o.pids), "leave it out for the default", "a limit cannot be negative")
	}
	return nil
}

// fill parses the flags that may be given several times.
func (o *createOptions) fill(req *node.CreateRequest) error {
	env := map[string]string{}
	for _, path := range o.envFiles {
		if err := addEnvFile(env, path); err != nil {
			return err
		}
	}
	for _, e := range o.env {
		if err := addEnv(env, e); err != nil {
			return err
		}
	}
	if len(env) > 0 {
		req.Env = env
	}
	for _, s := range o.volumes {
		mount, volume, err := parseVolume(s)
		switch {
		case err != nil:
			return err
		case mount != nil:
			req.Mounts = append(req.Mounts, *mount)
		default:
			req.Volumes = append(req.Volumes, *volume)
		}
	}
	for _, s := range o.ports {
		p, err := parsePort(s)
		if err != nil {
			return err
		}
		req.Ports = append(req.Ports, p)
	}
	var err error
	if req.Labels, err = parsePairs("label", o.labels); err != nil {
		return err
	}
	req.Metadata, err = parsePairs("metadata", o.metadata)
	return err
}

func (a *app) createCommand() *cobra.Command {
	var f format
	var o createOptions
	var pull string
	cmd := &cobra.Command{
		Use: "create [flags] IMAGE", Short: "Make a sandbox that stays", Args: exact("an image"),
		Long: "Create makes a sandbox that stays until it is removed. IMAGE is what `atoll run` takes, or a disk image that\n" +
			"`atoll image import` took in: such a machine boots its own system, cloud-init in it is told its name and address and\n" +
			"what --user-data says, and the agent is put into it, which create waits for. `atoll logs` shows its console.",
		Example: "  atoll create base --name work\n  atoll exec work -- python3 -c 'print(2+2)'\n" +
			"  atoll image import debian-12-genericcloud-amd64.qcow2 debian-vm\n  atoll create debian-vm --name vm --runtime microvm --memory 1g --user-data cloud.yaml",
		RunE: func(cmd *cobra.Command, args []string) error {
			if err := f.check(); err != nil {
				return err
			}
			req, err := o.request(args[0])
			if err != nil {
				return err
			}
			b, err := a.openDaemon(cmd.Context())
			if err != nil {
				return err
			}
			if err := a.fetch(cmd.Context(), b, req.Image, pull); err != nil {
				return err
			}
			sb, err := b.Create(cmd.Context(), req)
			if err != nil {
				return err
			}
			return a.printCreated(&f, []node.Sandbox{sb})
		},
	}
	f.flags(cmd, "print the ID only")
	o.flags(cmd)
	pullFlag(cmd, &pull)
	a.completes(cmd, 1, imageNames)
	return cmd
}
