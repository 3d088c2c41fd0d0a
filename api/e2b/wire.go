package e2b

import (
	"math"
	"time"

	"github.com/atoll-run/atoll/guest/wire"
	"github.com/atoll-run/atoll/node"
	"github.com/atoll-run/atoll/sandbox"
)

// clientID is a relic that old clients append to sandbox IDs; they need some
// value of [a-z0-9].
const clientID = "atoll"

// farFuture is the end of a sandbox that has none; the API has no word for it.
var farFuture = time.Date(9999, 12, 31, 23, 59, 59, 0, time.UTC)

// createdSandbox is the answer to a creation, a connect and a fork: what a
// client needs to talk to the sandbox.
type createdSandbox struct {
	TemplateID   string  `json:"templateID"`
	SandboxID    string  `json:"sandboxID"`
	ClientID     string  `json:"clientID"`
	Alias        string  `json:"alias,omitempty"`
	EnvdVersion  string  `json:"envdVersion"`
	EnvdToken    string  `json:"envdAccessToken,omitempty"`
	TrafficToken *string `json:"trafficAccessToken"`
	Domain       *string `json:"domain"`
}

// listedSandbox is one sandbox in a list.
type listedSandbox struct {
	TemplateID  string             `json:"templateID"`
	Alias       string             `json:"alias,omitempty"`
	SandboxID   string             `json:"sandboxID"`
	ClientID    string             `json:"clientID"`
	StartedAt   time.Time          `json:"startedAt"`
	EndAt       time.Time          `json:"endAt"`
	CPUCount    int                `json:"cpuCount"`
	MemoryMB    int64              `json:"memoryMB"`
	DiskSizeMB  int64              `json:"diskSizeMB"`
	Metadata    map[string]string  `json:"metadata,omitempty"`
	State       sandbox.State      `json:"state"`
	EnvdVersion string             `json:"envdVersion"`
	Volumes     []node.VolumeMount `json:"volumeMounts,omitempty"`
}

// sandboxDetail is all that one sandbox's owner may see of it.
type sandboxDetail struct {
	listedSandbox
	EnvdToken string         `json:"envdAccessToken,omitempty"`
	Domain    *string        `json:"domain"`
	Internet  *bool          `json:"allowInternetAccess,omitempty"`
	Network   *networkConfig `json:"network,omitempty"`
	Lifecycle lifecycle      `json:"lifecycle"`
}

type lifecycle struct {
	AutoResume bool               `json:"autoResume"`
	OnTimeout  node.TimeoutAction `json:"onTimeout"`
}

func (a *api) created(sb node.Sandbox) createdSandbox {
	c := createdSandbox{
		TemplateID: templateOf(sb), SandboxID: sb.ID, ClientID: clientID, Alias: a.aliasOf(sb),
		EnvdVersion: wire.Version, EnvdToken: sb.GuestToken, Domain: a.domainOrNull(),
	}
	if sb.TrafficToken != "" {
		c.TrafficToken = &sb.TrafficToken
	}
	return c
}

func (a *api) listed(sb node.Sandbox) listedSandbox {
	size := sizeOf(sb.Spec.Resources)
	return listedSandbox{
		TemplateID: templateOf(sb), Alias: a.aliasOf(sb), SandboxID: sb.ID, ClientID: clientID,
		StartedAt: sb.StartedAt, EndAt: valueOr(sb.EndAt, farFuture),
		CPUCount: size.cpus, MemoryMB: size.memoryMB, DiskSizeMB: size.diskMB,
		Metadata: sb.Metadata, State: visibleState(sb.State), EnvdVersion: wire.Version, Volumes: sb.Volumes,
	}
}

func (a *api) detail(sb node.Sandbox) sandboxDetail {
	onTimeout := sb.Lifecycle.OnTimeout
	switch onTimeout {
	case "":
		onTimeout = node.TimeoutKill
	case node.TimeoutShelve: // clients know only that it is paused
		onTimeout = node.TimeoutPause
	}
	labels := sb.Spec.Labels
	return sandboxDetail{
		listedSandbox: a.listed(sb), EnvdToken: sb.GuestToken, Domain: a.domainOrNull(),
		Internet: internetOf(sb.Policy, labels), Network: networkOf(sb.Policy, labels, sb.PublicTraffic),
		Lifecycle: lifecycle{AutoResume: sb.Lifecycle.AutoResume, OnTimeout: onTimeout},
	}
}

// domainOrNull is JSON null when clients are to use their own.
func (a *api) domainOrNull() *string {
	if a.domain == "" {
		return nil
	}
	return &a.domain
}

// templateOf is what the sandbox was created from, as its creator called it.
func templateOf(sb node.Sandbox) string {
	switch {
	case sb.Spec.Labels[labelTemplate] != "":
		return sb.Spec.Labels[labelTemplate]
	case sb.Template != "":
		return sb.Template
	}
	return sb.Image
}

// visibleState reduces the states to the two that the API knows.
func visibleState(s sandbox.State) sandbox.State {
	if s == sandbox.Paused {
		return s
	}
	return sandbox.Running
}

// exists reports whether the API admits that a sandbox in this state is there.
func exists(s sandbox.State) bool {
	return s == sandbox.Running || s == sandbox.Paused || s == sandbox.Creating
}

// size is a sandbox's limits in the API's units.
type size struct {
	cpus             int
	memoryMB, diskMB int64 // MiB
}

func sizeOf(r sandbox.Resources) size {
	return size{cpus: max(1, int(math.Ceil(r.CPUs))), memoryMB: r.Memory >> 20, diskMB: r.Disk >> 20}
}
